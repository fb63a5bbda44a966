// The page on which a person ranks answers. Answers are texts of models: their HTML comes from the server, which lets no
// tag of theirs through, and the page's policy runs no other script than this one.

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
const LETTERS = "ABCDEFGHI";
const QUESTIONS = {
  overall: ["Which answer is better?", "Rank the answers, the best first."],
  helpfulness: ["Which answer is more helpful?", "Rank the answers by helpfulness, the most helpful first."],
  safety: ["Which answer is safer?", "Rank the answers by safety, the safest first."],
};
const STRENGTH_KEYS = { significantly: "S", better: "B", slightly: "L", negligibly: "N" };
const STRENGTH_NAMES = {
  significantly: "Significantly better", better: "Better", slightly: "Slightly better", negligibly: "Negligibly better or unsure",
};
const REASONS = ["All answers are bad in the same way", "I cannot tell: it takes knowledge I do not have", "The prompt makes no sense", "I would rather not read this"];
const HINT = matchMedia("(pointer: coarse)").matches ? "Best first: tap letters, or drag them here" : "Best first: press 1, 2, …, or click or drag letters";
const RETRY = 2000; // milliseconds

let state = null; // what the server last said
let tiers = []; // ranking: lists of shown numbers, best first
let unsafe = new Set();
let strength = null;
let tying = false; // whether the next answer ties with the last
let busy = false;
let asWritten = false;
let visibleSince = 0; // when the task came into view
let looked = 0; // milliseconds that it was in view before that

// ------------------------------------------------------------------------------------------------------------ server
async function ask(path, body) {
  const options = { headers: { authorization: `Bearer ${token}` }, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      notice(body?.key ? "Not saved yet: the server does not answer. Trying again…" : "The server does not answer. Trying again…");
      await new Promise((resume) => setTimeout(resume, RETRY));
      continue;
    }
    const found = await answer.json().catch(() => ({ error: `the server failed (${answer.status})` }));
    notice("");
    return answer.ok ? found : Promise.reject(Object.assign(new Error(found.error), { status: answer.status }));
  }
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

const remember = (key, value) => {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify(value));
  } catch { /* without storage a reload forgets what was not sent */ }
};
const recall = (key) => {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
};
const pendingKey = () => `pending ${token}`;
const draftKey = () => `draft ${token} ${state.task.item} ${state.task.aspect}`;

async function send(body) {
  if (busy) return;
  busy = true;
  remember(pendingKey(), body); // until it is known to be saved, a reload sends it again under the same key
  paint();
  try {
    show(await ask("/api/judge", body), body);
  } catch (error) {
    if (error.status === 409) await begin();
    notice(error.message);
    if (!isRefused(error)) return; // it may be saved yet: a reload sends it again
  } finally {
    busy = false;
    paint();
  }
  remember(pendingKey(), null);
}

const isRefused = ({ status }) => status === 409 || status === 422; // for what it says; not for who sends it or a full disk

function judgement(said) {
  const { item, aspect } = state.task;
  const key = Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16).padStart(8, "0")).join("");
  return { key, item, aspect, seconds: seconds(), unsafe: [...unsafe], ...said };
}

function submit() {
  if (!isReady()) return;
  const ranks = [];
  tiers.forEach((tier, level) => tier.forEach((n) => (ranks[n] = level + 1)));
  send(judgement({ ranks, strength: isPair() && tiers.length === 2 ? strength : null }));
}

async function undo() {
  if (busy) return;
  busy = true;
  paint();
  try {
    show(await ask("/api/undo", { last: state.progress.last })); // that one and no other, however often it is sent
    say("Undone");
  } catch (error) {
    if (error.status === 409) await begin();
    else notice(error.message);
  } finally {
    busy = false;
    paint();
  }
}

async function begin() {
  const found = await ask("/api/task");
  $("guidelines").innerHTML = found.guidelines;
  show(found);
}

// ---------------------------------------------------------------------------------------------------------- one task
function show(found, sent) {
  if (sent) remember(`draft ${token} ${sent.item} ${sent.aspect}`, null);
  state = found;
  const { task } = state;
  $("work").hidden = $("ranking").hidden = !task;
  $("end").hidden = Boolean(task);
  if (!task) {
    const { judged, skipped } = state.progress;
    $("thanks").textContent = `You judged ${count(judged, "prompt")}${skipped ? ` and skipped ${skipped}` : ""}. Thank you. You may close this page.`;
    tiers = [];
    paint();
    return;
  }
  if (state.before) remember(draftKey(), { ...state.before, looked: 0 });
  const draft = state.before ?? recall(draftKey());
  tiers = [];
  (draft?.ranks ?? []).forEach((rank, n) => { if (rank) (tiers[rank - 1] ??= []).push(n); });
  tiers = tiers.filter(Boolean);
  unsafe = new Set(draft?.unsafe ?? []);
  strength = draft?.strength ?? null;
  looked = draft?.looked ?? 0;
  tying = false;
  visibleSince = performance.now();
  fill();
  window.scrollTo(0, 0);
  paint();
}

const isPair = () => state.task.answers.length === 2;
const ranked = () => tiers.flat();
const isReady = () => Boolean(state?.task) && !busy && ranked().length === state.task.answers.length && (!isPair() || tiers.length === 1 || Boolean(strength));
const seconds = () => Math.round(looked + (document.hidden ? 0 : performance.now() - visibleSince)) / 1000;
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const say = (text) => { $("said").textContent = text; };

function element(tag, properties = {}, ...children) {
  const { dataset, ...own } = properties;
  const made = Object.assign(document.createElement(tag), own);
  Object.assign(made.dataset, dataset ?? {});
  made.append(...children);
  return made;
}

function texts(messages) {
  return messages.flatMap(({ role, html, text }) => {
    const body = element("div", { className: "text", dir: "auto" });
    if (asWritten) {
      body.classList.add("as-written");
      body.textContent = text;
    } else body.innerHTML = html;
    return role && !(messages.length === 1 && role === "assistant") ? [element("div", { className: "role", textContent: role }), body] : [body];
  });
}

function letter(n) {
  const made = element("button", { className: "letter", textContent: LETTERS[n], title: `Rank answer ${LETTERS[n]} (${n + 1})`, dataset: { answer: n } });
  made.setAttribute("aria-keyshortcuts", String(n + 1));
  return made;
}

function fill() {
  const { task } = state;
  $("prompt").replaceChildren(...texts(task.prompt));
  $("question").textContent = QUESTIONS[task.aspect][isPair() ? 0 : 1] + (task.aspects.length > 1 ? ` (${task.aspects.indexOf(task.aspect) + 1} of ${task.aspects.length})` : "");
  $("answers").replaceChildren(...task.answers.map((messages, n) => {
    const flag = element("button", { className: "flag", textContent: "Unsafe", title: `Answer ${LETTERS[n]} is unsafe (Shift ${n + 1})`, onclick: () => toggleUnsafe(n) });
    const top = element("div", { className: "top" }, letter(n), element("span", { className: "rank" }), flag);
    const body = element("div", { className: "body", tabIndex: 0 }, ...texts(messages));
    return element("article", { className: "card", ariaLabel: `Answer ${LETTERS[n]}` }, top, body);
  }));
  $("strengths").replaceChildren(...task.strengths.map((name) => {
    const made = element("button", { textContent: STRENGTH_NAMES[name], title: `Key ${STRENGTH_KEYS[name]}`, dataset: { strength: name }, onclick: () => setStrength(name) });
    made.setAttribute("role", "radio");
    return made;
  }));
}

function paint() {
  document.body.setAttribute("aria-busy", busy);
  const { progress, task } = state ?? {};
  if (progress) {
    $("bar").max = Math.max(1, progress.wanted);
    $("bar").value = progress.done;
    const pace = progress.pace === null ? "" : ` · ${progress.pace < 10 ? progress.pace.toFixed(1) : Math.round(progress.pace)} s each`;
    $("pace").textContent = `${progress.done} of ${progress.wanted} done · ${progress.judged} by you${pace}`;
  }
  if (!task) return;
  const level = new Map(tiers.flatMap((tier, index) => tier.map((n) => [n, index + 1])));
  document.querySelectorAll(".card").forEach((card, n) => {
    card.classList.toggle("ranked", level.has(n));
    card.classList.toggle("unsafe", unsafe.has(n));
    card.querySelector(".rank").textContent = level.has(n) ? place(level.get(n)) : "";
    card.querySelector(".flag").setAttribute("aria-pressed", unsafe.has(n));
  });
  const focused = $("tiers").contains(document.activeElement) ? document.activeElement.dataset.answer : null;
  const parts = [gap(0)];
  tiers.forEach((tier, index) => {
    const made = element("li", { className: tier.length > 1 ? "tier tied" : "tier", dataset: { tier: index } }, ...tier.map(letter));
    parts.push(made, gap(index + 1));
  });
  $("tiers").replaceChildren(...parts);
  if (focused !== null) $("tiers").querySelector(`[data-answer="${focused}"]`)?.focus();
  $("unranked").replaceChildren(...task.answers.map((_, n) => n).filter((n) => !level.has(n)).map(letter));
  $("unranked").hidden = level.size === task.answers.length;
  for (const button of $("strengths").children) {
    const name = button.dataset.strength;
    button.setAttribute("aria-checked", name === strength);
    button.disabled = level.size < 2 || tiers.length < 2;
  }
  $("tie").setAttribute("aria-pressed", tying || (isPair() && level.size === 2 && tiers.length === 1));
  $("submit").disabled = !isReady();
  $("submit").textContent = busy ? "Saving…" : "Save";
}

function gap(index) {
  const only = tiers.length === 0;
  return element("li", { className: only ? "gap only" : "gap", textContent: only ? HINT : index > 0 && index < tiers.length ? "›" : "", dataset: { gap: index } });
}

const place = (level) => ["best", "2nd", "3rd"][level - 1] ?? `${level}th`;

function changed(text) {
  if (tiers.length < 2) strength = null;
  const ranks = [];
  tiers.forEach((tier, level) => tier.forEach((n) => (ranks[n] = level + 1)));
  remember(draftKey(), { ranks: Array.from(ranks, (rank) => rank ?? 0), unsafe: [...unsafe], strength, looked: seconds() * 1000 });
  paint();
  say(text);
}

// ----------------------------------------------------------------------------------------------------------- ranking
function take(n) {
  tiers = tiers.map((tier) => tier.filter((other) => other !== n)).filter((tier) => tier.length);
}

function toggle(n) {
  if (isPair()) {
    tiers = tying ? [[n, 1 - n]] : [[n], [1 - n]]; // the other one is second
    tying = false;
    return changed(`${LETTERS[n]} is better`);
  }
  if (ranked().includes(n)) {
    take(n);
    return changed(`${LETTERS[n]} taken out`);
  }
  if (tying && tiers.length) tiers.at(-1).push(n);
  else tiers.push([n]);
  tying = false;
  changed(`${LETTERS[n]} ${place(tiers.length)}`);
}

function tie() {
  if (isPair()) {
    tiers = [[0, 1]];
    return changed("Both are equal");
  }
  if (tiers.length) tying = !tying;
  paint();
}

function move(n, step) {
  const from = tiers.findIndex((tier) => tier.includes(n));
  if (tiers[from].length > 1) {
    take(n);
    tiers.splice(step < 0 ? from : from + 1, 0, [n]);
  } else if (tiers[from + step]) {
    tiers[from + step].push(n);
    tiers.splice(from, 1);
  }
  changed(`${LETTERS[n]} ${place(tiers.findIndex((tier) => tier.includes(n)) + 1)}`);
}

function drop(n, target) {
  const { gap: before, tier: onto } = target.dataset;
  const partner = onto === undefined ? null : tiers[onto].find((other) => other !== n);
  const next = before === undefined ? null : tiers.slice(Number(before)).flat().find((other) => other !== n);
  const stays = onto !== undefined && partner === undefined;
  if (stays) return;
  take(n);
  if (onto !== undefined) tiers.find((tier) => tier.includes(partner)).push(n);
  else if (before !== undefined) {
    const index = tiers.findIndex((tier) => tier.includes(next));
    tiers.splice(index < 0 ? tiers.length : index, 0, [n]);
  }
  if (isPair() && ranked().length === 1) {
    if (before === "0") tiers.push([1 - n]);
    else tiers.unshift([1 - n]);
  }
  changed(ranked().includes(n) ? `${LETTERS[n]} ${place(tiers.findIndex((tier) => tier.includes(n)) + 1)}` : `${LETTERS[n]} taken out`);
}

function toggleUnsafe(n) {
  if (!unsafe.delete(n)) unsafe.add(n);
  changed(`${LETTERS[n]} is ${unsafe.has(n) ? "unsafe" : "not unsafe"}`);
}

function setStrength(name) {
  if (tiers.length < 2) return;
  strength = name;
  changed(STRENGTH_NAMES[name]);
}

function clear() {
  tiers = [];
  strength = null;
  tying = false;
  changed("Cleared");
}

// ------------------------------------------------------------------------------------------- dragging, mouse or finger
let drag = null;

document.addEventListener("pointerdown", (event) => {
  const handle = event.target.closest?.(".letter");
  if (!handle || event.button !== 0 || busy) return;
  drag = { n: Number(handle.dataset.answer), x: event.clientX, y: event.clientY, id: event.pointerId, ghost: null, over: null };
});
document.addEventListener("pointermove", (event) => {
  if (!drag || event.pointerId !== drag.id) return;
  if (!drag.ghost) {
    if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < 6) return;
    drag.ghost = element("div", { className: "ghost letter", textContent: LETTERS[drag.n] });
    drag.ghost.style.display = "grid";
    drag.ghost.style.placeItems = "center";
    document.body.append(drag.ghost);
    $("ranking").classList.add("dragging");
  }
  event.preventDefault();
  drag.ghost.style.left = `${event.clientX}px`;
  drag.ghost.style.top = `${event.clientY}px`;
  const target = document.elementFromPoint(event.clientX, event.clientY)?.closest(".gap, .tier, #unranked") ?? null;
  if (target === drag.over) return;
  drag.over?.classList.remove("over");
  target?.classList.add("over");
  drag.over = target;
});
const release = (event) => {
  if (!drag || event.pointerId !== drag.id) return;
  const { n, ghost, over } = drag;
  drag = null;
  if (!ghost) return;
  ghost.remove();
  over?.classList.remove("over");
  $("ranking").classList.remove("dragging");
  document.addEventListener("click", swallow, { capture: true, once: true }); // letting go is no click
  setTimeout(() => document.removeEventListener("click", swallow, { capture: true }), 0);
  if (over && event.type === "pointerup") drop(n, over);
};
const swallow = (event) => event.stopPropagation();
document.addEventListener("pointerup", release);
document.addEventListener("pointercancel", release);

// -------------------------------------------------------------------------------------------------- buttons and keys
document.addEventListener("click", (event) => {
  const handle = event.target.closest?.(".letter");
  if (handle && state?.task && !busy) toggle(Number(handle.dataset.answer));
  if (event.detail) document.activeElement?.closest("button")?.blur(); // who uses a mouse means to save with Enter
});
$("submit").onclick = submit;
$("tie").onclick = tie;
$("clear").onclick = clear;
$("undo").onclick = undo;
$("skip").onclick = openReasons;
$("help").onclick = () => $("keys").showModal();
$("guide").onclick = toggleGuide;
$("source").onclick = toggleSource;

function toggleGuide() {
  showGuide($("guidelines").hidden);
}

function showGuide(there) {
  $("guidelines").hidden = !there;
  $("guide").setAttribute("aria-pressed", there);
}

function toggleSource() {
  asWritten = !asWritten;
  $("source").setAttribute("aria-pressed", asWritten);
  if (state?.task) fill();
  paint();
}

function openReasons() {
  if (!state?.task || busy) return;
  $("other").value = "";
  $("other-go").disabled = true;
  $("reasons").returnValue = "no";
  $("reasons").showModal();
}

function skip(reason) {
  $("reasons").close("done");
  send(judgement({ ranks: [], strength: null, skipped: reason }));
}

$("choices").replaceChildren(...REASONS.map((reason, n) => element("button", { type: "button", textContent: `${n + 1}  ${reason}`, onclick: () => skip(reason) })));
$("other").oninput = () => { $("other-go").disabled = !$("other").value.trim(); };
$("other").onkeydown = (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  if ($("other").value.trim()) skip($("other").value.trim());
};
$("other-go").onclick = (event) => {
  event.preventDefault();
  skip($("other").value.trim());
};

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("close", () => document.activeElement?.blur()); // else Enter would open it again
}

const digit = (event) => Number(/^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1] ?? 0); // the key, whatever a layout puts on it

document.addEventListener("keydown", (event) => {
  if (event.repeat && !event.key.startsWith("Arrow")) return; // a key that is held down says one thing
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input")) return;
  const n = digit(event);
  if ($("reasons").open) {
    if (n && n <= REASONS.length) { event.preventDefault(); skip(REASONS[n - 1]); }
    return;
  }
  if ($("keys").open) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const always = { u: undo, m: toggleSource, g: toggleGuide, "?": () => $("keys").showModal() };
  const act = always[key] ?? (state?.task && !busy ? keyOfTask(event, key, n) : null);
  if (act) { event.preventDefault(); act(); }
});

function keyOfTask(event, key, n) {
  if (n && n <= state.task.answers.length) return () => (event.shiftKey ? toggleUnsafe(n - 1) : toggle(n - 1));
  const chosen = state.task.strengths.find((name) => STRENGTH_KEYS[name].toLowerCase() === key);
  if (chosen) return () => setStrength(chosen);
  const chip = $("tiers").contains(event.target) && event.target.dataset.answer;
  if (chip && key === "ArrowLeft") return () => move(Number(chip), -1);
  if (chip && key === "ArrowRight") return () => move(Number(chip), 1);
  const elsewhere = isReady() ? "header, #strengths, .flag, #tie, #clear, a" : "button, a";
  if (key === "Enter" && !event.target.closest?.(elsewhere)) return submit;
  return { x: openReasons, "=": tie, Backspace: () => { const last = ranked().at(-1); if (last !== undefined) isPair() ? clear() : toggle(last); } }[key] ?? null;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) looked += performance.now() - visibleSince;
  else visibleSince = performance.now();
});

// ------------------------------------------------------------------------------------------------------------- start
showGuide(matchMedia("(min-width: 901px)").matches);
const start = async () => {
  const pending = recall(pendingKey());
  let refused = "";
  if (pending) {
    let keep = false;
    await ask("/api/judge", pending).catch((error) => {
      refused = error.status === 409 ? "" : error.message;
      keep = !isRefused(error);
    });
    if (!keep) remember(pendingKey(), null);
    if (!refused) remember(`draft ${token} ${pending.item} ${pending.aspect}`, null);
  }
  await begin().catch((error) => { refused = error.message; });
  notice(refused);
};
addEventListener("hashchange", () => location.reload());
start();
