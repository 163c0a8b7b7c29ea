// Requests to the server.

export async function api(path, values) {  // GET without values, else POST
  const headers = { "Content-Type": "application/json" };
  const request = values === undefined ? {} : { method: "POST", headers, body: JSON.stringify(values) };
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw Object.assign(new Error("the server does not answer: is it still running?"), { away: true });
  }
  const answer = await response.json().catch(() => ({ error: "the server's answer is not JSON" }));
  if (response.ok) return answer;
  const { status } = response;
  throw Object.assign(new Error(answer.error || `error ${status}`), { away: status === 403, status });
}

export const query = (path, values) => `${path}?${new URLSearchParams(values)}`;

export function loadImage(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the image cannot be loaded"));
    image.src = source;
  });
}

export const loadNamed = (name) => loadImage(query("/image", { name }));  // an image that the server has

export function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

export async function sendMask(blob) {  // its name on the server; null if it is all black
  return (await api("/mask", { data: await base64(blob) })).mask;
}
