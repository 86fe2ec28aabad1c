"use strict";
// Chat with the served model. No library, no build step: the server's own streaming API and /metrics.

const at = (id) => document.getElementById(id);
const messages = [];
const speeds = { on: null, off: null };
const history = [];
let running = null; // AbortController of the answer that is being made

const headers = () => ({
  "Content-Type": "application/json",
  ...(at("key").value ? { Authorization: "Bearer " + at("key").value } : {}),
});

function turn(role) {
  const box = document.createElement("div");
  box.className = "turn " + role;
  at("talk").append(box);
  return box;
}

function put(box, text, kind) {
  const span = document.createElement("span");
  if (kind) span.className = kind;
  span.textContent = text;
  box.append(span);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (/^data: ?\{/.test(part)) yield JSON.parse(part.slice(5));
  }
}

function showStats(metrics, speed, drafting) {
  const stats = metrics.speculative_decoding;
  if (!stats) return;
  const length = stats.mean_acceptance_length;
  at("accepted-len").textContent = drafting && length ? length.toFixed(2) : "–";
  if (!speed) return;
  speeds[drafting ? "on" : "off"] = speed;
  at("speed-on").textContent = speeds.on ? speeds.on.toFixed(0) : "–";
  at("speed-off").textContent = speeds.off ? speeds.off.toFixed(0) : "–";
  at("ratio").textContent = speeds.on && speeds.off ? (speeds.on / speeds.off).toFixed(2) + " ×" : "–";
}

function idle() {
  running = null;
  at("send").textContent = "send";
}

async function ask(text) {
  const question = { role: "user", content: text };
  put(turn("user"), text);
  const box = turn("assistant");
  const drafting = at("draft").checked;
  const own = new AbortController();
  running = own;
  at("send").textContent = "stop";
  let answer = "", count = 0, first = 0, later = 0, speed = 0, keep = true;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: own.signal,
      body: JSON.stringify({
        messages: [...messages, question], stream: true, return_token_origins: true, return_spec_stats: true, draft: drafting,
        temperature: Number(at("temperature").value), max_tokens: Number(at("max-tokens").value),
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice && choice.delta && choice.delta.content) answer += choice.delta.content;
      if (choice && choice.origins) {
        const stick = at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 60;
        // A round: accepted drafts, the rejected rest, and what the target made in its place.
        const made = choice.origins.tokens, drafts = choice.origins.rejected;
        made.forEach(([piece, origin], i) => {
          if (i === made.length - 1 && origin === "target") for (const draft of drafts.splice(0)) put(box, draft, "rejected");
          put(box, piece, origin);
        });
        for (const draft of drafts) put(box, draft, "rejected");
        count += made.length;
        // The clock starts when the first tokens are there, so it does not count them.
        if (first) later += made.length;
        else first = performance.now();
        const seconds = (performance.now() - first) / 1000;
        speed = later && seconds > 0 ? later / seconds : 0;
        showStats(chunk.metrics, speed, drafting);
        if (stick) at("talk").scrollTop = at("talk").scrollHeight;
      }
    }
    const note = document.createElement("span");
    note.className = "note";
    note.textContent = `${count} tokens, ` + (speed ? `${speed.toFixed(0)} tokens/s, ` : "") +
      (drafting ? `accepted length ${at("accepted-len").textContent}` : "no drafts");
    box.append(note);
    box.dataset.done = "yes";
  } catch (error) {
    const stopped = error.name === "AbortError";
    keep = stopped && answer !== "";
    put(box, stopped ? " (stopped)" : "error: " + error.message, "error");
  }
  if (running !== own) return; // a new conversation has begun, and this turn is not part of it
  // A failed turn is shown but not sent again: it has no answer to go on from. A stopped one has what came.
  if (keep) messages.push(question, { role: "assistant", content: answer });
  idle();
}

function read(text) {
  const values = {};
  for (const line of text.split("\n")) {
    const match = /^draftkit:(\w+)\{[^}]*\} (\S+)$/.exec(line);
    if (match) values[match[1]] = Number(match[2]);
  }
  return values;
}

let last = null;
async function watch() {
  try {
    const now = read(await (await fetch("/metrics")).text());
    const drafted = now.spec_decode_num_draft_tokens_total, verified = now.spec_decode_num_verified_tokens_total;
    const wasted = now.spec_decode_num_wasted_tokens_total, rounds = now.spec_decode_num_drafts_total;
    at("running").textContent = now.num_requests_running ?? "–";
    if (last && rounds > last.rounds) {
      const share = (verified - last.verified) / Math.max(1, drafted - last.drafted);
      at("budget").textContent = (100 * share).toFixed(0) + " %";
      at("wasted").textContent = (100 * (wasted - last.wasted) / Math.max(1, verified - last.verified)).toFixed(0) + " %";
    }
    const passed = last ? rounds - last.rounds : 0;
    history.push(passed > 0 ? [(drafted - last.drafted) / passed, (verified - last.verified) / passed] : [0, 0]);
    if (history.length > 120) history.shift();
    last = { drafted, verified, wasted, rounds };
    draw();
  } catch { at("running").textContent = "–"; }
}

function draw() {
  const canvas = at("history"), pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const top = Math.max(1, ...history.map((h) => h[0])) * 1.1;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  history.forEach(([drafted, verified], i) => {
    const y = (value) => canvas.height * (1 - value / top);
    pen.fillStyle = style.getPropertyValue("--accepted");
    pen.fillRect(i * 2, y(verified), 2, canvas.height - y(verified));
    pen.fillStyle = style.getPropertyValue("--target");
    if (drafted) pen.fillRect(i * 2, y(drafted), 2, 2);
  });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = at("prompt").value.trim();
  if (text) { at("prompt").value = ""; ask(text); }
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  // While an answer runs, submitting stops it: that is for the button. The next question waits in its box.
  if (!running) at("form").requestSubmit();
});
at("clear").addEventListener("click", () => {
  if (running) running.abort();
  idle();
  messages.length = 0;
  at("talk").replaceChildren();
});
at("show-rejected").addEventListener("change", (event) =>
  document.body.classList.toggle("hide-rejected", !event.target.checked));

async function begin() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    const body = await response.json();
    at("model").textContent = response.ok ? `${body.data[0].id} · ${body.data[0].gamma} drafts per round` :
      response.status === 401 ? "needs an API key" : "loading…";
    if (!response.ok) setTimeout(begin, 1000);
  } catch { setTimeout(begin, 1000); }
}
at("key").addEventListener("change", begin);
setInterval(watch, 1000);
watch();
begin();
