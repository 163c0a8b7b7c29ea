// The edit as the options of run.json, which the server reads.

import { sendMask } from "./api.js";
import { mask, maskFile } from "./mask.js";
import { state } from "./state.js";

let upload = { version: 0, name: null };  // the mask that the server has

async function maskName() {  // on the server; null for an empty mask
  const { version } = mask;
  if (upload.version === version) return upload.name;
  const name = mask.count ? await sendMask(await maskFile()) : null;
  if (mask.version === version) upload = { version, name };
  return name;
}

export async function options() {
  const name = await maskName();
  const { image, drags, prompt, model, config, seed } = state.edit;
  return { image, drags, mask: name, prompt, model, config, seed, ...state.settings.fixed };
}

export function recipe() {  // what a generated image depends on
  const { prompt, negative, guidance, model, seed, config } = state.edit;
  return JSON.stringify([prompt, negative, guidance, model, seed, config.steps, config.size]);
}

// As long as a generated image's recipe is the same, a drag starts from the image's own latent: the options
// name no image, and the server generates it again.
export async function jobOptions() {
  const values = await options();
  const { generated, negative, guidance } = state.edit;
  return generated === recipe() ? { ...values, image: null, negative, guidance } : values;
}

export async function checkOptions() {  // a generated image is edited as a whole
  const values = await options();
  if (state.edit.generated === recipe()) values.config = { ...values.config, window: false };
  return values;
}

export async function generationOptions() {
  const { negative, guidance } = state.edit;
  return { ...(await options()), image: null, mask: null, drags: [], negative, guidance };
}

export const fingerprint = () => JSON.stringify([state.edit, mask.version]);
