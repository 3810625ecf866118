// The page: a photo in, a list of answers out, from one network or two.

import { openNetwork, readJson } from "./network.js";
import { planCrop } from "./pixels.js";

const $ = (id) => document.getElementById(id);
const LARGEST = 4096; // pixels of the longer side; phones refuse larger canvases
const ROUNDS = 5; // the milliseconds of a photo are the median of as many runs

let entries = []; // of models.json: the network, then the one to compare
let networks = []; // those that are loaded, in the order of `entries`
let photo = null; // ImageData
let stream = null; // of the camera
let turn = 0; // of the last photo; the answers for an older one are dropped

// Photos

async function showFile(file) {
  closeCamera();
  const mine = ++turn;
  say("Reading the photo…");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    if (mine === turn) fail(`${file.name || "This file"} is no picture that this browser can read.`);
    return;
  }
  if (mine !== turn) return;
  const pixels = readPixels(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  $("photo").setAttribute("aria-label", file.name ? `The photo ${file.name}` : "The photo");
  showPhoto(pixels);
  await answer();
}

/** Return the pixels of a picture; transparent ones lie on white, as in the evaluation. */
function readPixels(picture, width, height) {
  const shrink = Math.min(1, LARGEST / Math.max(width, height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(width * shrink)), Math.max(1, Math.round(height * shrink)));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function showPhoto(pixels) {
  photo = pixels;
  const canvas = $("photo");
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  show("photo");
  placeFrame(pixels.width, pixels.height);
}

/** Draw the frame of what the network sees over a picture of this size, which fills the stage on one side. */
function placeFrame(width, height) {
  if (!networks.length) return;
  const plan = planCrop(width, height, networks[0].contract.card.preprocessing);
  const style = $("frame").style;
  style.setProperty("--aspect", width / height);
  style.left = `${(100 * plan.left) / plan.width}%`;
  style.top = `${(100 * plan.top) / plan.height}%`;
  style.width = `${(100 * plan.size) / plan.width}%`;
  style.height = `${(100 * plan.size) / plan.height}%`;
  $("stage").style.setProperty("--aspect", width / height);
  $("frame").hidden = $("frame-note").hidden = plan.size >= plan.width && plan.size >= plan.height;
}

/** Show one of: empty, photo, camera. */
function show(what) {
  for (const id of ["empty", "photo", "camera"]) $(id).hidden = id !== what;
  $("stage").classList.toggle("filled", what !== "empty");
  if (what === "empty") $("frame").hidden = $("frame-note").hidden = true;
  const filming = what === "camera";
  for (const id of ["file", "choose", "camera-button"]) $(id).hidden = filming;
  $("shoot").hidden = $("stop").hidden = !filming;
  $("status").setAttribute("aria-live", filming ? "off" : "polite"); // a film would never stop talking
}

// The camera

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    $("capture").click(); // a page without https may not film, but may ask a phone for one photo
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
  } catch (error) {
    const missing = error.name === "NotFoundError";
    fail(missing ? "This device has no camera." : "The browser does not give the camera to this page.");
    return;
  }
  clearError();
  const video = $("camera");
  video.srcObject = stream;
  await video.play();
  show("camera");
  $("shoot").focus();
  film(++turn);
}

/** Answer for one picture of the camera after the other, until a photo or the end. */
async function film(mine) {
  const video = $("camera");
  while (stream && mine === turn) {
    if (networks.length && video.videoWidth) {
      placeFrame(video.videoWidth, video.videoHeight);
      const pixels = readPixels(video, video.videoWidth, video.videoHeight);
      const results = await ask(pixels);
      if (mine !== turn || !results) return;
      showResults(results);
    }
    await new Promise(requestAnimationFrame);
  }
}

async function takePhoto() {
  const video = $("camera");
  if (!video.videoWidth) return;
  const pixels = readPixels(video, video.videoWidth, video.videoHeight);
  closeCamera();
  turn++;
  $("photo").setAttribute("aria-label", "The photo of the camera");
  showPhoto(pixels);
  $("camera-button").focus();
  await answer();
}

function closeCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  $("camera").srcObject = null;
}

function leaveCamera() {
  closeCamera();
  turn++;
  show(photo ? "photo" : "empty");
  if (photo) placeFrame(photo.width, photo.height);
  $("camera-button").focus();
  answer();
}

// Answers

async function answer() {
  if (!networks.length) return;
  if (!photo) {
    showReady();
    return;
  }
  const mine = ++turn;
  say("Looking…");
  clearError();
  document.body.dataset.state = "looking";
  await pause(); // the photo is drawn first
  const results = await ask(photo);
  if (!results || mine !== turn) return;
  showResults(results);
  const times = results.map(({ runMs }) => [runMs]);
  for (let round = 1; round < ROUNDS; round++) {
    for (const [i, { network, pixels }] of results.entries()) {
      await pause();
      if (mine !== turn) return;
      times[i].push((await network.run(pixels)).runMs); // in turns, so that a slow phase is shared
    }
  }
  showResults(results.map((result, i) => ({ ...result, runMs: median(times[i]) })));
  document.body.dataset.state = "answered";
}

function pause() {
  return new Promise((resolve) => setTimeout(resolve));
}

function median(values) {
  return values.sort((a, b) => a - b)[values.length >> 1];
}

/** Return the results of the networks that are shown, or null after an error, which is shown. */
async function ask(pixels) {
  const asked = networks.slice(0, $("compare").checked ? 2 : 1);
  try {
    const results = [];
    for (const network of asked) results.push({ network, ...(await network.classify(pixels)) });
    return results;
  } catch (error) {
    fail(`The network failed: ${error.message ?? error}`);
    return null;
  }
}

function showResults(results) {
  const cards = $("networks");
  while (cards.children.length > results.length) cards.lastElementChild.remove();
  results.forEach((result, i) => {
    fillCard(cards.children[i] ?? cards.appendChild(copyTemplate("network-template")), result);
  });
  const [first] = results[0].answers;
  say(`${first.name}, ${percent(first.probability)}`);
  const difference = $("difference");
  difference.hidden = results.length < 2;
  if (results.length === 2) difference.textContent = compare(results);
}

function fillCard(card, { network, answers, prepareMs, runMs }) {
  const { label, bytes } = network.entry;
  card.querySelector("h3").textContent = label;
  const facts = card.querySelector(".facts");
  facts.textContent = `${megabytes(bytes)} · ${milliseconds(runMs)}`;
  facts.title = `The network takes ${milliseconds(runMs)}, preparing the photo ${milliseconds(prepareMs)}.`;
  const list = card.querySelector("ol");
  while (list.children.length > answers.length) list.lastElementChild.remove();
  answers.forEach(({ name, index, probability }, i) => {
    const line = list.children[i] ?? list.appendChild(copyTemplate("answer-template"));
    Object.assign(line.dataset, { index, probability });
    line.querySelector(".name").textContent = name;
    line.querySelector(".share").textContent = percent(probability);
    line.querySelector(".bar > span").style.width = `${100 * probability}%`;
  });
}

function copyTemplate(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

function compare([a, b]) {
  const others = new Map(b.answers.map(({ index, probability }) => [index, probability]));
  const shared = a.answers.filter(({ index }) => others.has(index));
  const largest = Math.max(0, ...shared.map(({ index, probability }) => Math.abs(probability - others.get(index))));
  const agree = a.answers[0].index === b.answers[0].index;
  const same = agree ? "Both give the same first answer" : "The first answers differ";
  const points = `${(100 * largest).toFixed(1)} points`;
  return `${same}; ${shared.length} of ${a.answers.length} answers are in both lists, at most ${points} apart.`;
}

function percent(share) {
  return share >= 0.9995 ? "100 %" : share >= 0.001 ? `${(100 * share).toFixed(1)} %` : "< 0.1 %";
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function milliseconds(time) {
  return `${time < 10 ? time.toFixed(1) : time.toFixed(0)} ms`;
}

// What the page says

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

function showReady() {
  say("Ready for a photo");
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = false;
  say("");
  document.body.dataset.state = "failed";
}

function clearError() {
  $("error").hidden = true;
}

// Networks

async function start() {
  try {
    ({ models: entries } = await readJson("models.json"));
    networks = [await openNetwork(entries[0])];
  } catch (error) {
    fail(`The network cannot be loaded: ${error.message ?? error}`);
    return;
  }
  const { card } = networks[0].contract;
  $("model-name").textContent = card.name;
  document.title = `${card.name}: what is in this photo?`;
  if (entries[1]) {
    $("compare-text").textContent = `Compare with ${entries[1].label} (${megabytes(entries[1].bytes)})`;
    $("compare-row").hidden = false;
  }
  document.body.dataset.state = "ready";
  if (photo) placeFrame(photo.width, photo.height);
  if (!stream) await answer();
  keepForOffline();
}

async function switchComparison() {
  const box = $("compare");
  if (box.checked && !networks[1]) {
    box.disabled = true;
    say(`Loading ${entries[1].label}…`);
    try {
      networks[1] = await openNetwork(entries[1]);
    } catch (error) {
      box.checked = false;
      fail(`The second network cannot be loaded: ${error.message ?? error}`);
    }
    box.disabled = false;
    box.focus();
  }
  if (!stream && $("error").hidden) await answer();
}

/** Keep what was loaded, so that the page opens without a network the next time. */
async function keepForOffline() {
  if (!navigator.serviceWorker) return; // a browser has none on http, except on localhost
  try {
    await navigator.serviceWorker.register("offline.js");
    const { active } = await navigator.serviceWorker.ready;
    const loaded = performance.getEntriesByType("resource").map(({ name }) => name);
    const models = entries.flatMap(({ file, contract }) => [file, contract]);
    const own = [...loaded, ...models.map((name) => new URL(name, location).href)];
    active.postMessage([...new Set([location.href, ...own.filter((name) => name.startsWith(location.origin))])]);
  } catch (error) {
    console.info("The page works, but only with its server:", error);
  }
}

// Events

for (const id of ["file", "capture"]) {
  $(id).addEventListener("change", ({ target }) => {
    if (target.files.length) showFile(target.files[0]);
    target.value = ""; // the same photo can be chosen again
  });
}
$("camera-button").addEventListener("click", openCamera);
$("shoot").addEventListener("click", takePhoto);
$("stop").addEventListener("click", leaveCamera);
$("compare").addEventListener("change", switchComparison);

document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape" && stream) leaveCamera();
});
document.addEventListener("paste", ({ clipboardData }) => {
  const file = Array.from(clipboardData.files).find(({ type }) => type.startsWith("image/"));
  if (file) showFile(file);
});

let inside = 0; // entering a child comes before leaving its parent
const mark = (step) => {
  inside = Math.max(0, inside + step);
  $("stage").classList.toggle("over", inside > 0);
};
document.addEventListener("dragenter", () => mark(1));
document.addEventListener("dragleave", () => mark(-1));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  mark(-inside);
  const [file] = event.dataTransfer.files;
  if (file) showFile(file);
});

start();
