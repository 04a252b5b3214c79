"use strict";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const answer = byId("answer");

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const counted = (number) => number.toLocaleString("en");
const loss = (number) => (number == null ? "–" : number.toFixed(3));
const percent = (p) => (p >= 0.001 || p === 0 ? `${(100 * p).toFixed(1)}%` : "<0.1%");
const stepOf = (fingerprint) => fingerprint?.replace("step-", "step ");
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");

// For screen readers.
function announce(text) {
  byId("announcement").textContent = text;
}

// The server

class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.param = error.param;
  }
}

class Unreachable extends Error {}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The server is not responding. Is it still running?");
  }
  if (response.ok) return response;
  let error = null;
  try {
    ({ error } = await response.json());
  } catch {} // from a proxy, not from the server itself
  error ??= { message: `the server answered ${response.status} ${response.statusText}` };
  if (response.status === 401) askForKey(Boolean(key));
  throw new ApiError(response.status, error);
}

async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Unreachable("The connection to the server was lost.");
    });
    if (done) throw new Unreachable("The connection to the server was lost.");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function askForKey(rejected) {
  byId("key-label").textContent = rejected
    ? "The server rejected this API key."
    : "This server requires an API key.";
  byId("key").hidden = false;
  byId("key-value").focus();
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key-value").value);
  byId("key-value").value = "";
  byId("key").hidden = true;
  clearProblem();
  byId("prompt").focus();
  poll();
});

// The request

const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed"];
const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

function requestBody() {
  const body = { prompt: form.prompt.value, stream: true, logprobs: 5 };
  for (const name of NUMBERS) {
    if (form[name].value !== "") body[name] = Number(form[name].value);
  }
  // Chosen here, so that the same continuation can be requested again.
  body.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  if (form.stop.value) body.stop = form.stop.value.replace(/\\[nt\\]/g, (each) => ESCAPES[each]);
  return body;
}

// Problems: what is wrong, in the user's words, and a button that mends it

class Problem extends Error {
  // field: the one at fault. remedy: the button's label, and what it does before trying again.
  constructor(message, field, remedy) {
    super(message);
    this.field = field;
    this.remedy = remedy;
  }
}

const TRY_AGAIN = ["Try again", () => {}];
const nameOf = (field) => field.labels[0].firstChild.data.trim();

function reset(field) {
  const name = nameOf(field).toLowerCase();
  const label = field.defaultValue ? `Set ${name} to ${field.defaultValue}` : `Clear ${name}`;
  return [label, () => { field.value = field.defaultValue; }];
}

// As many characters as the model looks back in tokens, which are seldom shorter than a character.
function keepEnd(field) {
  return ["Keep the end of the prompt", () => {
    const characters = Array.from(field.value);
    field.value = characters.slice(-Math.min(model.max_seq_len, characters.length >> 1)).join("");
  }];
}

function useExample(field) {
  const example = model?.examples[0];
  return example && [`Start from “${example}”`, () => { field.value = example; }];
}

// What phones and word processors write instead of the characters on the keys.
const LOOKALIKES = { "‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..." };

function checkPrompt(field) {
  const empty = "Type a beginning for the model to continue.";
  if (!field.value) throw new Problem(empty, field, useExample(field));
  if (!model?.characters) return; // it knows them all
  const known = new Set(model.characters);
  const unknown = [...new Set(field.value)].filter((each) => !known.has(each));
  if (!unknown.length) return;
  const nearest = new Map(
    unknown.map((each) => {
      const choices = [LOOKALIKES[each], each.toLowerCase(), each.toUpperCase()];
      return [each, choices.find((text) => text && Array.from(text).every((c) => known.has(c))) ?? ""];
    }),
  );
  const listed = unknown.slice(0, 8).map(readable).join(", ") + (unknown.length > 8 ? " and others" : "");
  throw new Problem(
    `The model cannot read ${listed}: its training text had no such character.`,
    field,
    [
      [...nearest.values()].some(Boolean) ? "Replace or remove" : "Remove",
      () => { field.value = Array.from(field.value, (each) => nearest.get(each) ?? each).join(""); },
    ],
  );
}

// The ranges are those of the page's fields; what they cannot say, the server checks.
function checkNumber(field) {
  const { badInput, rangeUnderflow, rangeOverflow } = field.validity;
  const whole = field.step === "1";
  const fraction = whole && field.value !== "" && !Number.isSafeInteger(Number(field.value));
  if (!(badInput || rangeUnderflow || rangeOverflow || fraction)) return;
  const range = field.max ? ` from ${field.min} to ${field.max}` : field.min && ` of at least ${field.min}`;
  const kind = whole ? "a whole number" : "a number";
  throw new Problem(`${nameOf(field)} must be ${kind}${range || " of at most 15 digits"}.`, field, reset(field));
}

function problemOf(error) {
  if (error instanceof Problem) return error;
  if (error instanceof Unreachable) return new Problem(error.message, null, TRY_AGAIN);
  if (!(error instanceof ApiError)) throw error;
  const { status, param, message } = error;
  if (status === 429) return new Problem("The server is busy with other requests.", null, TRY_AGAIN);
  if (status >= 500) {
    const advice = "If trying again does not help, start the server again.";
    return new Problem(`${sentence(message)} ${advice}`, null, TRY_AGAIN);
  }
  const { prompt } = form;
  if (status === 413) return new Problem("The prompt is too long for the server.", prompt, keepEnd(prompt));
  const field = param && form.elements[param];
  if (!field) return new Problem(sentence(message));
  const words = message.replace(`${param}: `, "");
  if (field === prompt) return new Problem(sentence(words), prompt, useExample(prompt));
  return new Problem(sentence(`${nameOf(field)} ${words}`), field, reset(field));
}

let mend = null; // what the problem's button does

function showProblem({ message, field, remedy }) {
  byId("problem-text").textContent = message;
  byId("mend").hidden = !remedy;
  if (remedy) [byId("mend").textContent, mend] = remedy;
  byId("problem").hidden = false;
  byId("problem").scrollIntoView({ block: "nearest" }); // it may have scrolled out of sight
  if (!field) return;
  if (byId("sampling").contains(field)) byId("sampling").open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "problem-text");
}

function clearProblem() {
  byId("problem").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

// The continuation: text is appended and nothing is redrawn, however long it gets.

let running = null; // AbortController of the current request
const scores = new WeakMap(); // from a token's element to its [{ token, logprob, top }]
let entry = null; // the token that Tab moves to
let hovered = null;
let following = true; // keep the end in sight until the user scrolls away

class Answer {
  constructor(prompt, seed, started) {
    this.seed = seed;
    this.characters = Array.from(prompt).length; // code points, as the server counts
    this.tokens = 0;
    this.started = started;
    this.shown = 0;
    this.spoken = "";
    this.spokenAt = performance.now();
    this.pending = []; // tokens that form one character together
    this.finish = null;
    this.text = "";
    this.fingerprint = null;
    showText(prompt);
  }

  take(event) {
    if (event.error) throw new ApiError(500, event.error);
    this.fingerprint = event.system_fingerprint;
    for (const choice of event.choices) {
      this.add(choice.text, choice.logprobs);
      this.finish ??= choice.finish_reason;
    }
    const now = performance.now();
    if (now - this.shown > 150) {
      this.shown = now;
      // As it will be at the end, so that nothing moves then.
      byId("state").textContent = stateText([this.progress()], this.fingerprint) + this.seed;
    }
    if (now - this.spokenAt > 5000) this.speak();
    if (following && !document.hidden) byId("answer-end").scrollIntoView({ block: "nearest" });
  }

  add(text, logprobs) {
    const characters = Array.from(text);
    const end = this.characters + characters.length;
    const cut = (from, to) => characters.slice(from - this.characters, to - this.characters).join("");
    const offsets = logprobs ? logprobs.text_offset : [];
    const parts = document.createDocumentFragment();
    // Text held back for a token whose probabilities came earlier.
    const before = cut(this.characters, Math.max(this.characters, offsets[0] ?? end));
    if (before) (answer.lastElementChild ?? answer).append(before);
    offsets.forEach((offset, i) => {
      const [token, logprob, top] = ["tokens", "token_logprobs", "top_logprobs"].map((k) => logprobs[k][i]);
      this.pending.push({ token, logprob, top });
      this.tokens += 1;
      const own = cut(Math.max(offset, this.characters), Math.min(offsets[i + 1] ?? end, end));
      if (!own) return;
      parts.append(tokenElement(own, this.pending));
      this.pending = [];
    });
    answer.append(parts);
    this.characters = end;
    this.text += text;
    this.spoken += text;
    entry ??= answer.querySelector("b");
    if (entry) entry.tabIndex = 0;
  }

  progress() {
    const speed = (1000 * this.tokens) / (this.shown - this.started);
    return `${counted(this.tokens)} tokens, ${counted(Math.round(speed))} per second`;
  }

  // For screen readers: a few sentences at a time, not every token.
  speak() {
    byId("spoken").append(element("p", this.spoken));
    this.spoken = "";
    this.spokenAt = performance.now();
  }
}

// Replaces the text; earlier text, without its tokens, comes from the history.
function showText(prompt, text = "") {
  byId("start").hidden = true;
  byId("reading").hidden = false;
  byId("history").hidden = false; // before its first entry, so that nothing moves then
  byId("stale").hidden = true;
  answer.classList.remove("stale");
  answer.replaceChildren(element("i", prompt));
  if (text) answer.append(text);
  entry = null;
}

// After an error, the text that is there belongs to another request.
function markStale() {
  if (!answer.firstChild) return;
  byId("state").textContent = "";
  byId("stale").hidden = false;
  answer.classList.add("stale");
}

function tokenElement(text, parts) {
  const p = Math.exp(parts.reduce((sum, part) => sum + part.logprob, 0));
  const made = element("b", text, p > 0.05 ? "p1" : p > 0.01 ? "p2" : "p3");
  if (text.startsWith("\n")) made.classList.add("break");
  made.tabIndex = -1;
  scores.set(made, parts);
  return made;
}

async function complete() {
  if (running) return;
  clearProblem();
  hideToken();
  let body;
  try {
    checkPrompt(form.prompt);
    for (const name of NUMBERS) checkNumber(form[name]);
    body = requestBody();
  } catch (error) {
    markStale();
    showProblem(problemOf(error));
    return;
  }
  const fields = { ...Object.fromEntries(new FormData(form)), seed: String(body.seed) };
  const abort = (running = new AbortController());
  const sendHadFocus = document.activeElement === byId("send");
  byId("send").hidden = true;
  byId("abort").hidden = false;
  if (sendHadFocus) byId("abort").focus();
  byId("spoken").replaceChildren(element("p", "The model is writing."));
  byId("state").textContent = "";
  following = true;
  const started = performance.now();
  let reply = null;
  let end = "stopped";
  try {
    const response = await request("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: abort.signal,
    });
    reply = new Answer(body.prompt, fields.seed, started);
    answer.setAttribute("aria-busy", "true");
    for await (const event of readEvents(response)) reply.take(event);
    end = reply.finish === "stop" ? "reached the stop text" : "";
  } catch (error) {
    if (error.name !== "AbortError") {
      end = "interrupted";
      if (!reply) markStale();
      if (error.status !== 401) showProblem(problemOf(error)); // it asks for the key instead
    }
  }
  abort.abort(); // after an error, ignore the rest
  running = null;
  answer.removeAttribute("aria-busy");
  const abortHadFocus = document.activeElement === byId("abort");
  byId("abort").hidden = true;
  byId("send").hidden = false;
  if (abortHadFocus) byId("send").focus();
  if (!reply) {
    byId("spoken").replaceChildren();
    return;
  }
  reply.shown = performance.now();
  showState([reply.progress(), end], reply.fingerprint, fields.seed);
  reply.speak();
  byId("spoken").append(element("p", `${reply.tokens} tokens${end ? `, ${end}` : ""}.`));
  const { fingerprint, text } = reply;
  remember({ time: Date.now(), model: model?.name, fingerprint, fields, text });
}

const stateText = (words, fingerprint) =>
  [...words, stepOf(fingerprint), "seed "].filter(Boolean).join(" · ");

function showState(words, fingerprint, seedValue) {
  byId("state").textContent = stateText(words, fingerprint);
  const seed = element("button", seedValue, "link");
  seed.type = "button";
  seed.title = "Use this seed again";
  seed.addEventListener("click", () => {
    form.seed.value = seedValue;
    byId("sampling").open = true;
    showSamplingSummary();
  });
  byId("state").append(seed);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  complete();
});
byId("mend").addEventListener("click", () => {
  mend();
  showSamplingSummary();
  byId("send").focus();
  complete();
});
byId("abort").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    complete();
  } else if (event.key === "Escape") {
    if (running) running.abort();
    else hideToken();
  }
});
addEventListener(
  "scroll",
  () => {
    following = byId("answer-end").getBoundingClientRect().bottom < innerHeight + 60;
  },
  { passive: true },
);
if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("send-keys").textContent = "⌘ Enter";

function showSamplingSummary() {
  const set = [...byId("sampling").querySelectorAll("input")].filter((field) => field.value !== "");
  const words = set.map((field) => `${field.parentElement.firstChild.data.toLowerCase()} ${field.value}`);
  byId("sampling-summary").textContent = byId("sampling").open ? "" : `: ${words.join(", ")}`;
}
for (const type of ["toggle", "input"]) byId("sampling").addEventListener(type, showSamplingSummary);

// Examples

function showExamples() {
  byId("examples").replaceChildren(
    ...model.examples.map((text) => {
      const button = element("button", text);
      button.type = "button";
      button.addEventListener("click", () => {
        form.prompt.value = text;
        byId("send").focus();
        complete();
      });
      const item = element("li");
      item.append(button);
      return item;
    }),
  );
  byId("start").hidden = !model.examples.length || answer.firstChild !== null;
}

// The history: prompts, settings and texts, in this browser's storage

const REMEMBERED = 50;
const WHEN = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" };

function readHistory() {
  try {
    return JSON.parse(localStorage.getItem("history")) ?? [];
  } catch {
    return []; // the browser refuses storage
  }
}

function writeHistory(items) {
  try {
    localStorage.setItem("history", JSON.stringify(items));
  } catch {} // refused or full: the page works without
  showHistory(items);
}

function remember(item) {
  writeHistory([item, ...readHistory()].slice(0, REMEMBERED));
}

function showHistory(items) {
  byId("history").hidden = !items.length;
  byId("history-count").textContent = ` (${items.length})`;
  byId("history-list").replaceChildren(
    ...items.map((item) => {
      const { time, model, fingerprint, fields, text } = item;
      const button = element("button");
      button.type = "button";
      const when = new Date(time).toLocaleString("en", WHEN);
      const origin = [when, model, stepOf(fingerprint)];
      button.append(
        element("span", (fields.prompt + text).slice(0, 200)),
        element("span", origin.filter(Boolean).join(" · "), "muted"),
      );
      button.addEventListener("click", () => recall(item));
      const line = element("li");
      line.append(button);
      return line;
    }),
  );
}

function recall({ fingerprint, fields, text }) {
  if (running) return;
  clearProblem();
  hideToken();
  for (const [name, value] of Object.entries(fields)) form.elements[name].value = value;
  showSamplingSummary();
  showText(fields.prompt, text);
  showState(["from the history"], fingerprint, fields.seed);
  byId("prompt").focus();
}

byId("clear-history").addEventListener("click", () => {
  byId("history").open = false;
  writeHistory([]);
  announce("The history is empty.");
  byId("prompt").focus();
});

byId("copy").addEventListener("click", async () => {
  let copied = true;
  try {
    await navigator.clipboard.writeText(answer.textContent);
  } catch {
    // Only secure addresses have a clipboard: https, and this computer's.
    getSelection().selectAllChildren(answer);
    copied = document.execCommand("copy");
  }
  byId("copy").textContent = copied ? "Copied" : "Press Ctrl C";
  announce(byId("copy").textContent);
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
});

// One token's probabilities

function readable(token) {
  const names = { " ": "space", "\n": "line break", "\t": "tab", "": "nothing" };
  return names[token] ?? token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

function showToken(target) {
  const box = byId("token");
  box.replaceChildren();
  for (const { token, logprob, top } of scores.get(target)) {
    const list = element("ol");
    // Sorted, because objects list keys that look like numbers first.
    const all = Object.entries({ ...top, [token]: logprob }).sort((a, b) => b[1] - a[1]);
    for (const [each, log] of all) {
      const line = element("li", undefined, each === token ? "chosen" : "");
      const bar = element("div", undefined, "bar");
      bar.style.width = `${Math.max(1, 100 * Math.exp(log))}%`;
      line.append(element("code", readable(each)), bar, element("span", percent(Math.exp(log))));
      list.append(line);
    }
    box.append(list);
  }
  box.append(element("p", "Before temperature and filters"));
  box.hidden = false;
  // Below the token, or above it if there is no room: never over it, on however many lines it is.
  const sheet = box.offsetParent.getBoundingClientRect();
  const { left, top, bottom } = target.getBoundingClientRect();
  const above = top - box.offsetHeight - 8;
  const bar = document.querySelector(".actions").getBoundingClientRect().bottom;
  const fitsAbove = above >= Math.max(0, bar) && bottom + box.offsetHeight + 8 > innerHeight;
  box.style.top = `${(fitsAbove ? above : bottom + 8) - sheet.top}px`;
  box.style.left = `${Math.max(0, Math.min(left - sheet.left - 12, sheet.width - box.offsetWidth))}px`;
}

function hideToken() {
  byId("token").hidden = true;
}

// Not pointerover, which also comes when new text moves under a pointer at rest.
answer.addEventListener("pointermove", (event) => {
  if (event.pointerType !== "mouse" || event.target === hovered || !scores.has(event.target)) return;
  hovered = event.target;
  showToken(hovered);
});
answer.addEventListener("pointerleave", () => {
  if (hovered === null) return;
  hovered = null;
  if (answer.contains(document.activeElement)) showToken(document.activeElement);
  else hideToken();
});
answer.addEventListener("focusin", (event) => {
  entry.tabIndex = -1;
  entry = event.target;
  entry.tabIndex = 0;
  showToken(entry);
  entry.setAttribute("aria-describedby", "token");
});
answer.addEventListener("focusout", (event) => {
  event.target.removeAttribute("aria-describedby");
  hideToken();
});
answer.addEventListener("keydown", (event) => {
  const from = event.target;
  const all = answer.getElementsByTagName("b");
  const to = {
    ArrowRight: () => from.nextElementSibling,
    ArrowLeft: () => from.previousElementSibling,
    ArrowDown: () => nearestOnLine(from, 1),
    ArrowUp: () => nearestOnLine(from, -1),
    Home: () => all[0],
    End: () => all[all.length - 1],
  }[event.key]?.();
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (scores.has(to)) to.focus();
});

// The token above or below; null if there is none.
function nearestOnLine(from, direction) {
  const side = direction > 0 ? "nextElementSibling" : "previousElementSibling";
  const here = from.getBoundingClientRect();
  let best = null;
  let nearest = Infinity;
  let line = null;
  for (let each = from[side]; each; each = each[side]) {
    const { top, left } = each.getBoundingClientRect();
    if (Math.abs(top - here.top) < here.height / 2) continue;
    line ??= top;
    if (Math.abs(top - line) > here.height / 2) break;
    if (Math.abs(left - here.left) < nearest) {
      nearest = Math.abs(left - here.left);
      best = each;
    }
  }
  return best;
}

byId("shade").addEventListener("change", (event) => {
  answer.classList.toggle("shade", event.target.checked);
});

// The model and its curve

let model = null;
let points = [];
let lastStep = -1;
let delay = 3000; // ms until the next poll; longer while nothing changes
let timer = 0;
let polling = false;
let marked = null; // index of the point under the cursor

async function poll() {
  clearTimeout(timer);
  if (polling || document.hidden) return;
  polling = true;
  try {
    const begun = lastStep >= 0;
    const curve = await (await request(`api/curve?after=${lastStep}`)).json();
    // A newer checkpoint of a training in progress, which the server loads by itself.
    const renewed = curve.served_step !== (model?.progress.step ?? null);
    if (!model || renewed) {
      const first = !model;
      showModel(await (await request("api/card")).json());
      if (first) showExamples();
      else announce(`The server has loaded step ${counted(model.progress.step)}.`);
    }
    byId("offline").hidden = true;
    byId("key").hidden = true;
    lastStep = curve.last_step;
    if (curve.points.length) {
      points.push(...curve.points);
      // A page left open for days keeps no more points than can be seen.
      if (points.length > 8000) points = points.filter((p, i) => i % 2 === 0 || p.val_loss !== null);
    }
    if (curve.points.length || renewed) drawCurve();
    delay = curve.points.length ? 3000 : Math.min(30000, delay * 1.5);
    if (curve.points.length && begun) byId("in-progress").hidden = false;
    else if (delay > 20000) byId("in-progress").hidden = true;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return; // submitting the key polls again
    if (!(error instanceof Unreachable || error instanceof ApiError)) throw error;
    // The next server to respond may have another model.
    byId("offline").replaceChildren(element("p", `${error.message} Retrying every few seconds.`));
    byId("offline").hidden = false;
    model = null;
    points = [];
    lastStep = -1;
    delay = 3000;
  } finally {
    polling = false;
  }
  timer = setTimeout(poll, delay);
}

document.addEventListener("visibilitychange", () => {
  delay = 3000;
  poll();
});

function fillList(list, pairs) {
  list.replaceChildren();
  for (const [name, value] of pairs) {
    if (value == null) continue;
    list.append(element("dt", name), element("dd", String(value)));
  }
}

function showModel(card) {
  model = card;
  const { progress, settings } = card;
  document.title = `${card.name} · fastllm`;
  byId("name").textContent = card.name;
  byId("summary").textContent = [
    `${counted(card.parameters)} parameters`,
    progress.step && `step ${counted(progress.step)}`,
  ].filter(Boolean).join(" · ");
  const best = progress.best_val_loss;
  fillList(byId("card"), [
    ["Step", progress.step && counted(progress.step)],
    ["Trained on", progress.tokens && `${counted(progress.tokens)} tokens`],
    ["Validation loss", progress.val_loss && `${loss(progress.val_loss)} nats per token`],
    ["Best", best && progress.best_step !== progress.step ? `${loss(best)} at step ${counted(progress.best_step)}` : null],
    ["Shape", `${settings.num_layers} layers, ${settings.num_heads} heads, width ${settings.hidden_size}`],
    ["Context length", `${counted(card.max_seq_len)} tokens`],
    ["Vocabulary", `${counted(card.vocab_size)} tokens`],
    ["Precision", card.precision],
  ]);
  byId("run-settings").hidden = false;
  fillList(
    byId("settings"),
    Object.entries(settings).map(([name, value]) => [name, value === "" ? "none" : value]),
  );
  showSamplingSummary();
}

const LEFT = 26, RIGHT = 334, TOP = 6, BOTTOM = 166;
let xOf = () => 0; // from step to x

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Round numbers that divide a range into about `wanted` parts.
function ticks(from, to, wanted) {
  const rough = (to - from) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const spacing = power * [1, 2, 5, 10].find((each) => each * power >= rough);
  const result = [];
  for (let i = Math.ceil(from / spacing); i * spacing <= to; i++) result.push(i * spacing);
  return result.map((each) => Number(each.toPrecision(12)));
}

function drawCurve() {
  const losses = points.flatMap((p) => [p.loss, p.val_loss]).filter((each) => each !== null);
  if (!losses.length) return;
  byId("losses").hidden = false;
  let [low, high] = losses.reduce(([a, b], each) => [Math.min(a, each), Math.max(b, each)], [Infinity, -Infinity]);
  const room = (high - low) * 0.04 || 0.1;
  [low, high] = [low - room, high + room];
  const end = Math.max(points.at(-1).step, 1);
  xOf = (step) => LEFT + ((RIGHT - LEFT) * step) / end;
  const yOf = (value) => BOTTOM - ((BOTTOM - TOP) * (value - low)) / (high - low);
  const parts = [];
  for (const value of ticks(low, high, 5)) {
    const y = yOf(value).toFixed(1);
    parts.push(svg("path", { class: "grid", d: `M${LEFT} ${y}H${RIGHT}` }));
    parts.push(svg("text", { x: LEFT - 6, y: Number(y) + 4, "text-anchor": "end" }, value));
  }
  for (const step of ticks(0, end, 5).filter(Number.isInteger)) {
    const anchor = xOf(step) > RIGHT - 12 ? "end" : step ? "middle" : "start";
    parts.push(svg("text", { x: xOf(step), y: BOTTOM + 18, "text-anchor": anchor }, counted(step)));
  }
  for (const name of ["loss", "val_loss"]) {
    const known = points.filter((p) => p[name] !== null);
    const places = known.map((p) => `${xOf(p.step).toFixed(1)} ${yOf(p[name]).toFixed(1)}`);
    if (!places.length) continue;
    parts.push(svg("path", { class: name, d: `M${places.join("L")}` }));
    if (name === "val_loss" && known.length < 40) {
      parts.push(...known.map((p) => svg("circle", { cx: xOf(p.step), cy: yOf(p[name]), r: 2 })));
    }
  }
  const served = model.progress.step;
  if (served < end) {
    const x = xOf(served).toFixed(1);
    parts.push(svg("path", { class: "served", d: `M${x} ${TOP}V${BOTTOM}` }));
    const side = x > (LEFT + RIGHT) / 2 ? { x: x - 5, "text-anchor": "end" } : { x: Number(x) + 5 };
    parts.push(svg("text", { ...side, y: TOP + 8 }, `served: step ${counted(served)}`));
  }
  byId("curve").replaceChildren(...parts);
  mark(marked);
}

// Shows the values of a point; null for the last one.
function mark(index) {
  marked = index;
  if (!points.length) return;
  const i = Math.min(index ?? points.length - 1, points.length - 1);
  const { step, loss: training } = points[i];
  const validation = points.slice(0, i + 1).findLast((p) => p.val_loss !== null)?.val_loss;
  byId("curve-step").textContent = `Loss at step ${counted(step)}`;
  byId("curve-loss").textContent = loss(training);
  byId("curve-val-loss").textContent = loss(validation);
  const line = byId("curve").querySelector(".cursor");
  if (index === null) line?.remove();
  else {
    const d = `M${xOf(step)} ${TOP}V${BOTTOM}`;
    if (line) line.setAttribute("d", d);
    else byId("curve").append(svg("path", { class: "cursor", d }));
  }
  const curve = byId("curve");
  curve.setAttribute("aria-valuemin", points[0].step);
  curve.setAttribute("aria-valuemax", points.at(-1).step);
  curve.setAttribute("aria-valuenow", step);
  curve.setAttribute("aria-valuetext", `step ${step}: training loss ${loss(training)}, validation loss ${loss(validation)}`);
}

byId("curve").addEventListener("pointermove", (event) => {
  const box = byId("curve").getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * 336;
  let best = 0;
  points.forEach((p, i) => {
    if (Math.abs(xOf(p.step) - x) < Math.abs(xOf(points[best].step) - x)) best = i;
  });
  mark(best);
});
for (const type of ["pointerleave", "blur"]) byId("curve").addEventListener(type, () => mark(null));
byId("curve").addEventListener("keydown", (event) => {
  const last = points.length - 1;
  const here = marked ?? last;
  const far = Math.ceil(points.length / 20);
  const to = {
    ArrowLeft: here - 1,
    ArrowDown: here - 1,
    ArrowRight: here + 1,
    ArrowUp: here + 1,
    PageDown: here - far,
    PageUp: here + far,
    Home: 0,
    End: last,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  mark(Math.max(0, Math.min(last, to)));
});

showHistory(readHistory());
poll();
