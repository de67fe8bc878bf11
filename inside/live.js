/* The live part of the page: what a run has learned so far, a prompt, the text as it is written.

   It asks the server that sent the page (live.py). All text from models and users is set as textContent. `show`, of
   page.js, draws the record of what was written. */

(() => {
  const INPUTS = {  // setting: its label, attributes, and what it does
    temperature: ["Temperature", {type: "range", min: 0, max: 2, step: 0.01}, "0 always takes the likeliest token"],
    top_p: ["Top-p", {type: "range", min: 0.01, max: 1, step: 0.01}, "likeliest tokens up to this probability; 1: all"],
    top_k: ["Top-k", {type: "number", min: 0, step: 1}, "so many of the likeliest tokens; 0: all"],
    beam: ["Beam", {type: "number", min: 1, max: 64, step: 1}, "translations kept at each step; 1: no search"],
    max_new_tokens: ["Length", {type: "number", min: 1, max: 100000, step: 1}, "most tokens to write"],
    top: ["Answers", {type: "number", min: 0, max: 1000, step: 1}, "how many of the likeliest to show; 0: all"],
    seed: ["Seed", {type: "number", min: 0, step: 1}, "same seed, same text"],
  };
  const WORDS = {  // task: what the box is for, and what its button says
    text: ["Text to go on from", "Write"], translation: ["Sentence to translate", "Translate"],
    masked: ["Text with [MASK] where tokens are missing", "Fill in"], tagging: ["Sentence to label", "Label"],
    classification: ["Text to classify", "Classify"], "image-text": ["What to ask about the picture", "Ask"],
    contrastive: ["Captions to compare, with | between them", "Compare"],
    arithmetic: ["Problem, such as 7+5=", "Compute"], chat: ["Your message", "Send"],
    reward: ["Question that the set answer answers", "Score"], "question-answering": ["Question on the text", "Ask"],
    "image-classification": ["Choose a picture above; nothing need be written here", "Recognise"],
  };
  const MOST_BYTES = 9e6;  // of a picture
  const QUICK = 1000, SLOW = 5000;  // milliseconds between two questions to the server, in a run that learns or not

  const WAITS = "waiting for the model …";

  const SOON = 3;  // seconds: a text that took longer waits for the button Look inside, which writes it again

  /* An element with attributes (on...: listeners) and children; a text child becomes a text node. */
  function el(name, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "polyline", "circle", "text", "clipPath", "rect"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (typeof value === "boolean") made.toggleAttribute(key, value);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const state = el("p", {class: "small state", role: "status"});
  const error = el("p", {class: "asked error", role: "alert"});
  const about = el("p", {class: "small"}, "…");
  const trouble = el("p", {class: "error", role: "alert"});  // of the run, not of what was asked

  // ------------------------------------------------------------------------------------------------------------------
  // Requests

  /* Posts a request; returns the response. Throws an Error with the server's line if it refuses. */
  async function post(path, body, signal) {
    const response = await fetch(path, {method: "POST", headers: {"Content-Type": "application/json"},
                                        body: JSON.stringify(body), signal}).catch(lost);
    if (!response.ok) throw new Error((await response.json().catch(lost)).error);
    return response;
  }

  /* Yields the JSON values of a response's lines as they come. */
  async function* lines(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {done, value} = await reader.read().catch(lost);
      if (done) return;
      const found = (rest + value).split("\n");
      rest = found.pop();
      for (const line of found) yield JSON.parse(line);
    }
  }

  /* Throws the error of a request that got no answer; one that the user stopped stays what it is. */
  function lost(problem) {
    throw problem.name === "AbortError" ? problem : new Error("the server does not answer: is look.py still running?");
  }

  const words = problem => problem.constructor === Error ? problem.message : `a bug of this page: ${problem}`;

  // ------------------------------------------------------------------------------------------------------------------
  // Writing

  let model = null;       // what the server told of its model
  let running = null;     // the AbortController of the text that is being written
  let written = null;     // the request of the newest text, for a look inside it
  let messages = [];      // the dialogue
  let image = "";         // the chosen picture, as a data URL

  const label = el("span");
  const box = el("textarea", {id: "prompt", rows: 3, spellcheck: "false", autocapitalize: "off"});
  const shown = el("pre", {class: "written", tabindex: 0, "aria-label": "Written text"});
  const bubbles = el("div", {class: "chat", role: "log", "aria-label": "Dialogue"});
  const go = el("button", {class: "main", type: "submit"}, "Write");
  const stop = el("button", {type: "button", disabled: true, onclick: () => running?.abort()}, "Stop");
  const look = el("button", {type: "button", hidden: true, onclick: inside}, "Look inside");
  const reset = el("button", {type: "button", hidden: true, onclick: () => { forget(); box.focus(); }}, "Reset");
  const fresh = el("input", {type: "checkbox", id: "fresh"});
  const inputs = el("div", {class: "inputs"});
  const preview = el("img", {alt: "the chosen picture", hidden: true});
  const file = el("input", {type: "file", accept: "image/*", onchange: choose});
  const sees = el("div", {class: "bar", hidden: true}, el("label", {}, "Picture ", file), preview);
  const form = el("form", {novalidate: true, onsubmit: event => { event.preventDefault(); write(); }},
    sees, el("label", {for: "prompt", class: "small"}, label), box, inputs,
    el("div", {class: "bar"}, go, stop, reset, look, state));

  function choose() {
    const [chosen] = file.files;
    if (!chosen) return;
    error.textContent = chosen.size > MOST_BYTES ? "the picture is too large: choose one of at most 9 MB" : "";
    if (error.textContent) return;
    const reader = new FileReader();
    reader.onload = () => {
      image = preview.src = reader.result;
      preview.hidden = false;
    };
    reader.readAsDataURL(chosen);
  }

  /* Makes the form fit the model. Values that were set stay, unless look.py was started again. */
  function fit(found) {
    const first = model?.start !== found.start;
    model = found;
    const [what, verb] = WORDS[model.chats ? "chat" : model.task] ?? WORDS.text;
    label.textContent = `${what} (${model.chats ? "Enter" : "Ctrl+Enter"}: ${verb.toLowerCase()}, Esc: stop)`;
    go.textContent = verb;
    sees.hidden = !model.sees;
    reset.hidden = !model.chats;
    const at = model.step == null ? "" : `, step ${model.step.toLocaleString("en")}`;
    about.textContent = `${model.name}: ${model.size}${at}`;
    if (!first) return;
    forget();
    shown.replaceChildren();
    inputs.replaceChildren();
    box.disabled = go.disabled = false;
    for (const [name, value] of Object.entries(model.inputs)) inputs.append(input(name, value));
    if ("seed" in model.inputs) inputs.append(el("label", {}, el("span", {}, "New seed each time"), fresh));
    idle();
  }

  function input(name, value) {
    const [title, attributes, hint] = INPUTS[name];
    const shows = attributes.type === "range", output = el("output", {for: name}, shows ? String(value) : "");
    const made = el("input", {id: name, required: true, ...attributes, value, oninput: () => {
      if (shows) output.textContent = made.value;
      idle();
    }});
    return el("label", {title: hint}, el("span", {}, title, output), made);
  }

  const field = name => document.getElementById(name);

  /* Disables what would do nothing: the server refuses it. */
  function idle() {
    const beam = field("beam")?.valueAsNumber > 1, greedy = field("temperature")?.valueAsNumber === 0;
    for (const name of ["temperature", "top_p", "top_k", "seed"]) {
      const each = field(name);
      if (!each) continue;
      each.disabled = beam || greedy && name !== "temperature";
      each.closest("label").classList.toggle("idle", each.disabled);
    }
    fresh.disabled = field("seed")?.disabled;
  }

  /* {setting: number} of the inputs that do something; null, and a line about the first one that is wrong. */
  function settings() {
    const fields = Object.keys(model.inputs).map(field).filter(each => !each.disabled);
    const wrong = fields.find(each => !each.validity.valid);
    if (!wrong) return Object.fromEntries(fields.map(each => [each.id, each.valueAsNumber]));
    const most = wrong.max ? ` to ${wrong.max}` : " on";
    error.textContent = `${INPUTS[wrong.id][0]}: must be a whole number from ${wrong.min}${most}`;
    wrong.focus();
    return null;
  }

  async function write() {
    if (running || !model) return;
    const text = box.value;
    if (model.chats && !text.trim()) return;
    if (fresh.checked && !fresh.disabled) field("seed").value = Math.floor(Math.random() * 1e6);
    const set = settings();
    if (!set) return;
    const request = {...set, ...(model.sees ? {image} : {})};
    let pieces = 0, name = null, began = performance.now(), all = "";
    const turn = model.chats ? talk(text) : print();
    if (model.chats) request.messages = [...messages]; else request.prompt = text;
    running = new AbortController();
    busy(true);
    try {
      for await (const line of lines(await post("/write", request, running.signal))) {
        if (line.error) throw new Error(line.error);
        if (line.model) {
          [name, began] = [line.model, performance.now()];
          state.textContent = "writing …";
        }
        if (line.text !== undefined) {
          const given = !model.chats && !pieces && line.text === text;
          if (given) shown.prepend(el("span", {class: "given"}, text)); else turn.node.appendData(line.text);
          pieces += !given;
          all += given ? "" : line.text;
          scrollDown(model.chats ? bubbles : shown);
        }
        if (line.done) {
          turn.done(line.answer ?? all, line.forgotten);
          written = {...request, model: name};
        }
      }
      if (!written) throw new Error("the server stopped");
    } catch (problem) {
      if (problem.name === "AbortError") {
        if (name !== null && pieces) {  // the same text again, as far as it came
          written = {...request, model: name};
          if ("max_new_tokens" in written) written.max_new_tokens = pieces;
          turn.done(all);
        } else turn.failed(text);
      } else {
        error.textContent = words(problem);
        turn.failed(text);
      }
    }
    const seconds = (performance.now() - began) / 1000;
    state.textContent = all && `${all.length.toLocaleString("en")} characters in ${seconds.toFixed(1)} s`
                               + (running.signal.aborted ? ", stopped" : "");
    running = null;
    busy(false);
    if (written && model.looks && seconds < SOON) inside();
  }

  let scrolling = false, atEnd = true;

  /* Scrolls an element to its end with the next frame, unless the reader has scrolled up. */
  function scrollDown(element) {
    if (scrolling || !atEnd) return;
    scrolling = true;
    requestAnimationFrame(() => { scrolling = false; element.scrollTop = element.scrollHeight; });
  }

  for (const element of [shown, bubbles]) element.addEventListener("scroll", () => {
    atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 100;
  });

  function busy(is) {
    go.disabled = reset.disabled = is;
    stop.disabled = !is;
    if (is) {
      atEnd = true;
      error.textContent = "";
      state.textContent = WAITS;
      written = null;
    }
    look.hidden = !written || !model.looks;
  }

  /* Makes room for the next text. Returns its text node, and what to do at the end. */
  function print() {
    const node = document.createTextNode("");
    shown.replaceChildren(el("span", {}, node));
    return {node, done() {}, failed() { if (!node.data) shown.replaceChildren(); }};
  }

  /* Adds a message and the bubble of its answer. Returns the same as `print`. */
  function talk(text) {
    const node = document.createTextNode("");
    const mine = el("div", {class: "bubble user"}, text), its = el("div", {class: "bubble"}, node);
    bubbles.append(mine, its);
    messages.push({role: "user", content: text});
    box.value = "";
    return {
      node,
      done(answer, forgotten) {
        node.data = answer;
        messages.push({role: "assistant", content: answer});
        if (forgotten) bubbles.append(el("p", {class: "small"}, "The oldest turns no longer fit, and are forgotten."));
      },
      failed(again) {  // as if it had not been sent
        messages.pop();
        mine.remove();
        its.remove();
        box.value = again;
      },
    };
  }

  function forget() {
    messages = [];
    written = null;
    look.hidden = true;
    bubbles.replaceChildren();
    error.textContent = state.textContent = "";
  }

  async function inside() {
    look.disabled = true;
    error.textContent = "";
    try {
      show(await (await post("/inside", written)).json().catch(lost));
    } catch (problem) {
      error.textContent = words(problem);
    }
    look.disabled = false;
  }

  // ------------------------------------------------------------------------------------------------------------------
  // The run

  let run = null, rows = [];
  const HEIGHT = 220, LEFT = 44, RIGHT = 14, TOP = 26, BOTTOM = 34;  // pixels of the picture and its margins
  const SERIES = [["training", row => row.mean_loss ?? row.loss], ["validation", row => row.val_loss]];
  const chart = el("svg", {role: "img", onpointermove: point, onpointerleave: () => point(null)});
  const values = SERIES.map(([name]) => el("span", {class: `key ${name}`}, name));
  const at = el("span");
  const newest = el("pre", {tabindex: 0});
  const heading = el("figcaption");
  const learning = el("details", {hidden: true}, el("summary", {}, at, ...values),
    el("div", {class: "learning"}, el("figure", {}, chart), el("figure", {class: "sample"}, heading, newest)));

  /* About `count` round numbers from low to high. */
  function ticks(low, high, count) {
    const power = 10 ** Math.floor(Math.log10((high - low) / count));
    const step = [1, 2, 5, 10].map(n => n * power).find(n => n * count >= 0.99 * (high - low));
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return Array.from({length: last - first + 1}, (_, i) => [(first + i) * step, ((first + i) * step).toLocaleString(
      "en", {minimumFractionDigits: digits, maximumFractionDigits: digits})]);
  }

  /* Draws the losses. The steep start may lie above the picture. */
  function draw() {
    chart.setAttribute("aria-label", `Curves of the loss: ${caption(rows.at(-1))}`);
    const width = chart.clientWidth, curves = SERIES.map(([name, value]) => [
      name, rows.map(row => [row.step, value(row)]).filter(([, y]) => Number.isFinite(y))]);
    const all = curves.flatMap(([, points]) => points), longest = Math.max(...all.map(([x]) => x));
    if (!all.length || !width) return;
    const settled = all.filter(([x]) => x >= 0.1 * longest).map(([, y]) => y);
    const lowest = Math.min(...settled), highest = Math.max(...settled), room = 0.05 * (highest - lowest) || 0.5;
    const low = lowest - room, high = highest + room;
    const X = x => LEFT + (width - LEFT - RIGHT) * x / longest;
    const Y = y => TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low);
    const box = {x: LEFT, y: TOP - 4, width: width - LEFT - RIGHT + 4, height: HEIGHT - TOP - BOTTOM + 4};
    const parts = [el("clipPath", {id: "inner"}, el("rect", box))];
    for (const [y, text] of ticks(low, high, 5)) parts.push(
      el("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(y), y2: Y(y)}),
      el("text", {x: LEFT - 6, y: Y(y) + 4, "text-anchor": "end"}, text));
    for (const [x, text] of ticks(0, longest, Math.max(1, Math.min(longest, width / 90)))) parts.push(
      el("text", {x: X(x), y: HEIGHT - BOTTOM + 16, "text-anchor": x ? "middle" : "start"}, text));
    parts.push(el("text", {x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end"}, "updates"),
               el("text", {x: 0, y: 12}, "loss in nats"));
    for (const [name, points] of curves) {
      const line = points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
      parts.push(el("g", {class: name, "clip-path": "url(#inner)"}, el("polyline", {points: line}),
                    ...(points.length < 40 ? points.map(([x, y]) => el("circle", {cx: X(x), cy: Y(y), r: 2.5})) : [])));
    }
    chart.replaceChildren(...parts);
  }

  /* Shows a row's losses beside the names of the curves, and returns them in words. */
  function caption(row) {
    const before = rows.filter(each => each.step <= row.step);
    const texts = SERIES.map(([name, value]) => {
      const found = before.findLast(each => value(each) !== undefined);
      const y = found && value(found);
      return found ? `${name} ${Number.isFinite(y) ? y.toFixed(4) : "NaN or infinite"}` : name;
    });
    texts.forEach((text, i) => values[i].textContent = text);
    const most = run.max_iters ? ` of ${run.max_iters.toLocaleString("en")}` : "";
    at.textContent = `step ${row.step.toLocaleString("en")}${most}${run.learning ? "" : ", ended"}`;
    return `${at.textContent}, ${texts.join(", ")}`;
  }

  function point(event) {
    if (!rows.length) return;
    const share = event ? (event.offsetX - LEFT) / (chart.clientWidth - LEFT - RIGHT) : 1;
    caption(rows.findLast(row => row.step <= share * rows.at(-1).step) ?? rows[0]);
  }

  /* Takes in an answer to GET /run. */
  function follow(found) {
    if (found.model && (found.model.number !== model?.number || found.model.start !== model.start)) fit(found.model);
    if (!found.model) about.textContent = "Waiting for the run's first save …";
    if (running && found.waits && state.textContent === WAITS)
      state.textContent = "another tab is writing: yours is next …";
    if (trouble.textContent !== (found.error ?? "")) trouble.textContent = found.error ?? "";
    if (found.run !== run?.run || found.step < rows.at(-1)?.step) {  // another run, or an earlier save of it
      const other = rows.length > 0;
      rows = [];
      run = found;
      if (other) return;  // the next answer has all its rows
    }
    const changed = found.rows.length || found.learning !== run.learning;
    run = found;
    rows = rows.concat(found.rows);
    if (learning.hidden && rows.length) learning.open = run.learning;
    learning.hidden = !rows.length;
    if (changed && rows.length) draw();
    if (found.sample) {
      heading.textContent = `newest sample: ${found.sample.heading}`;
      if (newest.textContent !== found.sample.text) newest.textContent = found.sample.text;
    }
    heading.parentElement.hidden = !found.sample;
  }

  async function poll() {
    let wait = SLOW;
    if (!document.hidden) {
      try {
        const found = await (await fetch(`/run?since=${rows.at(-1)?.step ?? 0}`).catch(lost)).json().catch(lost);
        follow(found);
        wait = found.learning || !found.model || running ? QUICK : SLOW;
        if (error.dataset.lost) error.textContent = error.dataset.lost = "";
      } catch (problem) {
        error.textContent = error.dataset.lost = words(problem);
      }
    }
    setTimeout(poll, wait);
  }

  // ------------------------------------------------------------------------------------------------------------------

  box.disabled = go.disabled = true;
  box.addEventListener("keydown", event => {
    const sends = event.key === "Enter" && !event.isComposing &&
                  (event.ctrlKey || event.metaKey || model?.chats && !event.shiftKey);
    if (sends) { event.preventDefault(); write(); }
  });
  document.addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });
  const section = document.getElementById("live");
  section.append(about, trouble, learning, bubbles, form, error, shown);
  section.hidden = false;
  new ResizeObserver(() => rows.length && draw()).observe(chart);
  poll();
})();
