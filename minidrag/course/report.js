// Folds, and the slider over the states of the drag. Without this script all figures are still there.
const folds = [...document.querySelectorAll("details")];
const toggle = document.querySelector("button");
const open = (all) => folds.forEach((fold) => { fold.open = all; });
toggle.addEventListener("click", () => {
  open(!folds.every((fold) => fold.open));
  toggle.textContent = folds.every((fold) => fold.open) ? "Fold all figures" : "Show all figures";
});
if (location.hash === "#all") toggle.click();
let before = [];
addEventListener("beforeprint", () => { before = folds.map((fold) => fold.open); open(true); });
addEventListener("afterprint", () => folds.forEach((fold, i) => { fold.open = before[i]; }));
for (const slider of document.querySelectorAll(".slider")) {
  const frames = [...slider.querySelectorAll(".frame")];
  const input = slider.querySelector("input");
  const show = () => frames.forEach((frame, i) => frame.classList.toggle("now", i === Number(input.value)));
  slider.classList.add("live");
  input.addEventListener("input", show);
  show();
}
