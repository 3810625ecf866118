// A network in LiteRT.js: from the pixels of a photo to its most probable classes.

import { loadAndCompile, loadLiteRt, Tensor } from "@litertjs/core";
import { normalise, resizeAndCrop } from "./pixels.js";

let runtime; // a promise: the wasm is loaded once, when the first network is

/** Load a network of models.json: {file, contract, label, bytes}. */
export async function openNetwork(entry) {
  runtime ??= loadLiteRt("./litertjs/wasm/");
  const [contract] = await Promise.all([readJson(entry.contract), runtime]);
  // int8 gives other codes on a GPU, so all networks run on the processor, where they answer as in JAX.
  const model = await loadAndCompile(entry.file, { accelerator: "wasm" });
  return new Network(entry, contract, model);
}

export async function readJson(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} is missing from this folder (${answer.status})`);
  return answer.json();
}

class Network {
  constructor(entry, contract, model) {
    this.entry = entry;
    this.contract = contract;
    this.model = model;
  }

  /**
   * Return {pixels, answers, prepareMs, runMs} of an ImageData: what the network was given, and its answers
   * {name, index, probability}, the best first.
   */
  async classify(image, top = 5) {
    const { card, input } = this.contract;
    const start = performance.now();
    const pixels = normalise(resizeAndCrop(image, card.preprocessing), input.mean, input.std);
    const prepareMs = performance.now() - start;
    const { logits, runMs } = await this.run(pixels);
    const probabilities = softmax(logits);
    const best = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
    const answers = best.slice(0, top).map((index) => ({
      index,
      name: card.class_names?.[index] ?? `class ${index}`,
      probability: probabilities[index],
    }));
    return { pixels, answers, prepareMs, runMs };
  }

  /** Return {logits, runMs} of normalised pixels. */
  async run(pixels) {
    const start = performance.now();
    const given = new Tensor(pixels, this.contract.input.shape);
    try {
      const [logits] = await this.model.run(given);
      try {
        return { logits: Float32Array.from(logits.toTypedArray()), runMs: performance.now() - start };
      } finally {
        logits.delete();
      }
    } finally {
      given.delete(); // LiteRT.js holds tensors in wasm memory until it is told
    }
  }
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const shares = Array.from(logits, (logit) => Math.exp(logit - largest));
  const total = shares.reduce((a, b) => a + b, 0);
  return shares.map((share) => share / total);
}
