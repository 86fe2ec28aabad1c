"use strict";
// Chat with the served model. No library, no build step: the server's own streaming API and /metrics.

const at = (id) => document.getElementById(id);
const messages = [];
const speeds = new Map(); // a whole conversation and its settings -> tokens per second, with drafts and without
const history = [];
const examples = at("examples");
let running = null; // AbortController of the answer that is being made

// A header is bytes, and the server reads keys as UTF-8: so every key can be sent.
const bytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));
const headers = () => ({
  "Content-Type": "application/json",
  ...(at("key").value ? { Authorization: "Bearer " + bytes(at("key").value) } : {}),
});

function turn(role) {
  const box = document.createElement("div");
  box.className = "turn " + role;
  at("talk").append(box);
  return box;
}

// A rejected draft is no part of the text: what would break the line or show nothing has a sign.
const signs = { "\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣" };
const shown = (draft) => draft === "" ? "∅" : draft.replace(/[\n\r\t]|^ $/g, (one) => signs[one]);

function put(box, text, kind) {
  if (kind === "rejected") text = shown(text);
  const rejected = kind === "rejected", piece = document.createElement(rejected ? "del" : "span");
  if (kind) piece.className = kind;
  if (rejected) piece.setAttribute("aria-hidden", "true"); // not part of the answer
  piece.textContent = text;
  box.append(piece);
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

function showStats(metrics, speed, drafting, measured) {
  const length = metrics.speculative_decoding?.mean_acceptance_length;
  if (drafting) at("accepted-len").textContent = length ? length.toFixed(2) : "–";
  if (speed) measured[drafting ? "on" : "off"] = speed;
  at("speed-on").textContent = measured.on?.toFixed(0) ?? "–";
  at("speed-off").textContent = measured.off?.toFixed(0) ?? "–";
  at("ratio").textContent = measured.on && measured.off ? (measured.on / measured.off).toFixed(2) + " ×" : "–";
}

function idle() {
  running = null;
  at("talk").setAttribute("aria-busy", "false");
  at("send").textContent = "send";
  at("compare").disabled = false;
}

function busy(own) {
  running = own;
  at("send").textContent = "stop";
  at("compare").disabled = true;
  at("talk").setAttribute("aria-busy", "true"); // an answer is read out when it is complete, not token by token
}

// One answer into a box. Returns its text and whether it is to be kept; the box says what went wrong.
async function answer(asked, drafting, own, box) {
  const settings = { draft: drafting, temperature: Number(at("temperature").value), max_tokens: Number(at("max-tokens").value) };
  if (!at("thinking-choice").hidden) settings.reasoning_effort = at("thinking").value;
  const key = JSON.stringify([asked, settings.temperature, settings.max_tokens, settings.reasoning_effort]);
  if (!speeds.has(key)) speeds.set(key, {});
  let text = "", count = 0, first = 0, speed = 0, stats = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: own.signal,
      body: JSON.stringify({
        messages: asked, stream: true, return_token_origins: true, return_spec_stats: true, ...settings,
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice && choice.delta && choice.delta.content) text += choice.delta.content;
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
        first ||= made.length;
        // The server's clock starts when the first tokens are there, so it does not count them.
        const seconds = chunk.metrics.decode_seconds;
        speed = count > first && seconds > 0 ? (count - first) / seconds : 0;
        stats = chunk.metrics.speculative_decoding;
        showStats(chunk.metrics, speed, drafting, speeds.get(key));
        if (stick) at("talk").scrollTop = at("talk").scrollHeight;
      }
    }
    const note = document.createElement("span");
    note.className = "note";
    note.textContent = `${count} tokens, ` + (speed ? `${speed.toFixed(0)} tokens/s, ` : "") + drafted(drafting, stats);
    box.append(note);
    box.dataset.done = "yes";
    return { text, keep: true, speed };
  } catch (error) {
    const stopped = error.name === "AbortError";
    const gone = error instanceof TypeError ? "the server does not answer; is it still running?" : error.message;
    put(box, stopped ? " (stopped)" : "error: " + gone, stopped ? "error stopped" : "error");
    return { text, keep: stopped && text !== "", speed: 0 };
  }
}

// What drafting did in an answer, in words.
function drafted(drafting, stats) {
  if (!drafting) return "no drafts";
  const length = stats?.mean_acceptance_length, share = stats?.num_draft_tokens / (stats?.num_spec_tokens * stats?.num_spec_steps);
  return `accepted length ${length ? length.toFixed(2) : "–"}` +
    (share < 0.5 ? `, drafted in ${(100 * share).toFixed(0)} % of rounds (the drafter rested)` : "");
}

async function ask(text) {
  const asked = [...messages, { role: "user", content: text }];
  put(turn("user"), text);
  const box = turn("assistant"), own = new AbortController();
  busy(own);
  const made = await answer(asked, at("draft").checked, own, box);
  if (running !== own) return; // a new conversation has begun, and this turn is not part of it
  // A failed turn is shown but not sent again: it has no answer to go on from. A stopped one has what came.
  if (made.keep) messages.push(asked.at(-1), { role: "assistant", content: made.text });
  idle();
}

// The same conversation twice, one after the other so that neither slows the other down.
async function compare(text) {
  const asked = [...messages, { role: "user", content: text }];
  put(turn("user"), text);
  const pair = document.createElement("div"), own = new AbortController();
  pair.className = "pair";
  at("talk").append(pair);
  busy(own);
  const made = [];
  for (const drafting of [true, false]) {
    const box = document.createElement("div");
    box.className = "turn assistant";
    box.dataset.way = drafting ? "with drafts" : "without drafts";
    pair.append(box);
    made.push(await answer(asked, drafting, own, box));
    if (running !== own) return;
    if (own.signal.aborted || !made.at(-1).keep) break;
  }
  const [on, off] = made, verdict = document.createElement("div");
  if (on?.keep && off?.keep) {
    const same = on.text === off.text ? "The two texts are the same, letter by letter." : Number(at("temperature").value) > 0
      ? "The texts differ because both were drawn at random (temperature above 0)." : "The texts differ.";
    verdict.className = "verdict";
    verdict.textContent = `${same}${on.speed && off.speed ? ` With drafts: ${(on.speed / off.speed).toFixed(2)} × the speed.` : ""}`;
    pair.append(verdict);
    at("talk").scrollTop = at("talk").scrollHeight;
  }
  if (on?.keep) messages.push(asked.at(-1), { role: "assistant", content: on.text });
  idle();
}

function read(text) {
  const values = {};
  for (const line of text.split("\n")) {
    // A label's text may hold braces.
    const match = /^draftkit:(\w+)\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\} (\S+)$/.exec(line);
    if (!match) continue;
    const drafts = /drafts="(on|off)"/.exec(match[2]);
    values[match[1] + (drafts ? "_" + drafts[1] : "")] = Number(match[3]);
    values.model = /model_name=("(?:[^"\\]|\\.)*")/.exec(match[2])?.[1];
  }
  return values;
}

const percent = (part, whole) => (whole > 0 ? (100 * part / whole).toFixed(0) + " %" : "–");

async function offerThinking() { // the switch is there for models that say how they can be asked to think
  const list = await (await fetch("/v1/models", { headers: headers() })).json();
  at("thinking-choice").hidden = !list.data?.[0]?.thinking;
}

let last = null, served; // the last numbers; whose they were, null where nobody answered
async function watch() {
  try {
    const now = read(await (await fetch("/metrics")).text());
    if (served !== undefined && now.model && served !== now.model) begin(); // another server has taken its place
    if (now.model && served !== now.model) await offerThinking();
    served = now.model ?? null;
    const drafted = now.spec_decode_num_draft_tokens_total, verified = now.spec_decode_num_verified_tokens_total;
    const wasted = now.spec_decode_num_wasted_tokens_total, rounds = now.spec_decode_num_drafts_total;
    at("running").textContent = now.num_requests_running ?? "–";
    at("resting").textContent = rests(now);
    gone("");
    if (last && rounds > last.rounds) {
      at("budget").textContent = percent(verified - last.verified, drafted - last.drafted);
      at("wasted").textContent = percent(wasted - last.wasted, verified - last.verified);
    }
    const passed = last ? rounds - last.rounds : 0;
    history.push(passed > 0 ? [(drafted - last.drafted) / passed, (verified - last.verified) / passed] : [0, 0]);
    if (history.length > 120) history.shift();
    last = { drafted, verified, wasted, rounds };
    draw();
  } catch {
    served = null;
    at("running").textContent = "–";
    gone("The server does not answer. It may have ended or be starting again; this page goes on as soon as it is back.");
  }
}

function gone(text) {
  at("state").hidden = !text;
  if (at("state").textContent !== text) at("state").textContent = text;
}

// Whether the drafter takes part now, and why not.
function rests(now) {
  const on = now.spec_decode_tokens_per_second_on, off = now.spec_decode_tokens_per_second_off;
  if (now.spec_decode_drafting !== 0 || !on) return "";
  return `The drafter rests: at this load the target alone was measured at ${off.toFixed(0)} tokens/s, ` +
    `with drafts at ${on.toFixed(0)}. It is tried again from time to time.`;
}

function draw() {
  const canvas = at("history"), pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement), left = 16;
  const top = Math.max(4, Math.ceil(Math.max(...history.map((h) => h[0])) / 2) * 2), room = canvas.height - 8;
  const y = (value) => 4 + room * (1 - value / top);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.font = "9px system-ui, sans-serif";
  pen.textBaseline = "middle";
  for (const value of [0, top / 2, top]) {
    pen.fillStyle = style.getPropertyValue("--axis");
    pen.fillRect(left, y(value), canvas.width, 0.5);
    pen.fillText(String(value), 1, Math.min(Math.max(y(value), 6), canvas.height - 6));
  }
  history.forEach(([drafted, verified], i) => {
    const x = left + i * (canvas.width - left) / 120;
    pen.fillStyle = style.getPropertyValue("--accepted");
    pen.fillRect(x, y(verified), 2, y(0) - y(verified));
    pen.fillStyle = style.getPropertyValue("--target");
    if (drafted) pen.fillRect(x, y(drafted), 2, 2);
  });
  const [drafted, verified] = history.at(-1);
  const told = `per round in the last second: ${drafted.toFixed(1)} tokens drafted, ${verified.toFixed(1)} of them verified`;
  canvas.setAttribute("aria-label", told);
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = at("prompt").value.trim();
  if (text) { at("prompt").value = ""; ask(text); }
});
at("compare").addEventListener("click", () => {
  const text = at("prompt").value.trim() || messages.findLast((m) => m.role === "user")?.content;
  if (running || !text) return;
  if (!at("prompt").value.trim()) messages.splice(messages.findLastIndex((m) => m.role === "user")); // the last question again
  at("prompt").value = "";
  compare(text);
});
for (const example of document.querySelectorAll("#examples button"))
  example.addEventListener("click", () => { if (!running) ask(example.textContent); });
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
  at("talk").replaceChildren(examples);
});

let timer = 0, tries = 0;
async function begin() {
  clearTimeout(timer);
  const own = ++tries;
  let told = "connecting…", final = false;
  try {
    if ((await fetch("/ready")).status === 503) told = "loading…";
    else {
      const response = await fetch("/v1/models", { headers: headers() }), body = await response.json();
      final = response.ok || response.status === 401; // after a 401 only another key helps
      told = response.ok ? `${body.data[0].id} · ${body.data[0].gamma} drafts per round` :
        at("key").value ? "wrong API key" : "needs an API key";
    }
  } catch { /* nobody answers yet */ }
  if (own !== tries) return; // a later try knows better
  at("model").textContent = told;
  if (!final) timer = setTimeout(begin, 1000);
}
at("key").addEventListener("change", begin);
if (matchMedia("(min-width: 701px)").matches) at("side").open = true;
setInterval(watch, 1000);
watch();
begin();
