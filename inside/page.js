"use strict";
// The page of look.py. It draws a record of one forward pass; inside/record.py says what a record holds.
//
// show(record) draws one. After that, choose(token) draws what belongs to a token, look(head) what a head looked at.
// The texts of tokens come from users and models, so they enter the page as text nodes and attributes, never as HTML.

const state = {
  record: null,  // what is shown
  predicted: [],  // for each token the index of its prediction in record.predictions, or undefined
  token: 0,  // the chosen token: its index in the text
  source: 0,  // a translator's chosen token of the source
  head: null,  // the head that is shown on the text, {map, layer, head}: indices; layer and head are -1 for the mean
  kept: null,  // the head to go back to when the pointer leaves another
  maps: [],  // the weights of each entry of record.attention, Uint8Array in 255ths, once they are inflated
};

const CAUSAL = ["text", "chat", "translation", "image-text"];  // these predict a token from the position before it
const LABELLED = ["tagging", "answers"];  // tokens of these have labels
const MARKS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"};  // how white space is shown
const INVISIBLE = /[\s\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const MOST_BITS = 8;  // of surprise: the darkest tint
const HEAD_PIXELS = 96;  // most rows and columns of a head's small picture; larger ones keep the largest of neighbours
const [BLUE, BLACK] = [0xf6823b, 0];  // colours of canvas pixels: blue, green, red from the highest byte down
const AT_ONCE = 15;  // milliseconds of drawing heads before clicks are answered
const LEAST_LINK = 0.04;  // of the attention: less is not drawn as a line
const MAP_NAMES = {self: "Within the text", cross: "From the translation to the source",
                   encoder: "Within the source", image: "From the text to the picture, which each square shows"};
const NO_STREAM = "This browser can't unpack the attention: it has no DecompressionStream. Chrome and Edge have it from"
  + " version 103 on, Firefox from 113, Safari from 16.4.";

// ---------------------------------------------------------------------------------------------------------------------
// Small things

const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function makeSvg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The text with a sign for each character that would not be seen, or that would turn the order of others.
function visible(text) {
  const sign = (c) => MARKS[c] ?? (c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0))
                                   : `U+${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return text === "" ? "∅" : text.replace(INVISIBLE, sign);
}

// The same as nodes for running text: signs are faint, lines may break after them, and do after a newline.
function inked(text) {
  return visible(text).split(/([␣↵⇥])/).filter(Boolean).flatMap((part) => !/^[␣↵⇥]$/.test(part) ? [part]
    : [make("span", {class: "mark"}, part), make(part === "↵" ? "br" : "wbr")]);
}

function percent(p) {
  const value = 100 * p;
  const number = value < 0.01 ? "<\u00a00.01" : value >= 9.95 ? value.toFixed(1) : value.toPrecision(2);
  return `${number}\u00a0%`;  // spaces at which no line ends
}

const isCausal = () => CAUSAL.includes(state.record.kind);

// The prediction that belongs to a token, or undefined. A classifier has one, which belongs to all.
function predictionAt(token) {
  const {kind, predictions} = state.record;
  return predictions[kind === "classification" ? 0 : state.predicted[token]];
}

// ---------------------------------------------------------------------------------------------------------------------
// A record

// Draws a record into the page, in place of the one before.
function show(record) {
  Object.assign(state, {record, predicted: [], source: 0, head: null, kept: null, maps: []});
  record.predictions.forEach((prediction, index) => { state.predicted[prediction.at] = index; });
  byId("page").hidden = false;
  document.title = byId("title").textContent = record.title;
  byId("notes").replaceChildren(...record.notes.map((note) => make("li", {}, note)));
  drawPictureFrame();
  drawTexts();
  byId("heads").hidden = !record.attention.length;
  byId("maps").replaceChildren();
  choose(firstToken());
  drawEmbedding();
  afterPaint(() => inflateAll(record));
}

// The token that is chosen at first: the first predicted one that the model wrote, or a [MASK], or else any.
function firstToken() {
  const {written, predictions} = state.record;
  const first = predictions.find(({at, p}) => at >= written || !isCausal() && p === null)
    ?? predictions.at(isCausal() ? -1 : 0);
  return first?.at ?? 0;
}

function afterPaint(task) {
  requestAnimationFrame(() => setTimeout(task));
}

// The rows and columns of a picture's patches, if the tokens are patches; else undefined.
function patchGrid() {
  const {kind, attention} = state.record;
  return kind === "classification" ? attention.find(({name}) => name === "image")?.grid : undefined;
}

// ---------------------------------------------------------------------------------------------------------------------
// The text

function drawTexts() {
  const {tokens, source, predictions} = state.record;
  const grid = patchGrid();
  byId("text").classList.toggle("patches", Boolean(grid));
  byId("text").classList.toggle("headed", Boolean(grid) && tokens.length > grid[0] * grid[1]);  // by a class token
  byId("text").style.setProperty("--columns", grid?.[1] ?? 1);
  const next = predictions.at(-1)?.at === tokens.length ? ["…"] : [];  // what the model expects after the text
  byId("text").replaceChildren(...[...tokens, ...next].map(tokenSpan));
  byId("source").replaceChildren(...source.map((text, i) => option(text, i, `${i + 1} of ${source.length}`)));
  byId("source").hidden = !source.length;
  if (source.length) select("source", 0, 0);
}

function option(text, index, about) {
  return make("span", {role: "option", class: "token", tabindex: "-1", "aria-selected": "false", "data-index": index,
                       "aria-label": `${visible(text)}, ${about}`},
              make("span", {}, ...inked(text)));
}

function tokenSpan(text, index) {
  const {tokens, written} = state.record;
  const prediction = predictionAt(index);
  const isNext = index === tokens.length;
  const about = isNext ? ["the token after the text"]
    : [`token ${index + 1} of ${tokens.length}`, index < written ? "given" : "written by the model"];
  if (prediction && prediction.p !== null) about.push(`probability ${percent(prediction.p)}`);
  const label = labelOf(index);
  if (label) about.push(`label ${visible(label)}`);
  const span = option(text, index, about.join(", "));
  if (index >= written && !isNext) span.classList.add("written");
  if (!label) return span;
  span.classList.add("labelled");
  span.append(make("span", {class: "label"}, visible(label)));
  return span;
}

// What stands below a token: a label of its own, or what a masked model would put in the place of [MASK]; or "".
function labelOf(index) {
  const {kind, labels} = state.record;
  const prediction = predictionAt(index);
  if (kind === "masked" && prediction && prediction.p === null) return prediction.top[0][0];
  return LABELLED.includes(kind) ? labels[index] ?? "" : "";
}

// Moves the choice in a list of tokens, "text" or "source".
function select(list, from, to) {
  const spans = byId(list).children;
  for (const [index, chosen] of [[from, false], [to, true]]) {
    spans[index]?.setAttribute("aria-selected", chosen);
    spans[index]?.setAttribute("tabindex", chosen ? "0" : "-1");
  }
}

// Chooses a token of the text, and draws all that belongs to it.
function choose(token) {
  select("text", state.token, token);
  state.token = token;
  drawExpected();
  drawLens();
  markEmbedding();
  markRows();
  drawTints();
}

function chooseSource(token) {
  select("source", state.source, token);
  state.source = token;
  markRows();
  drawTints();
}

const choosers = {text: choose, source: chooseSource};

// The index to which a key moves from the index `from`, or undefined if it is another key.
function moved(key, spans, from) {
  const ends = {Home: 0, End: spans.length - 1};
  const steps = {ArrowLeft: -1, ArrowRight: 1};
  const lines = {ArrowUp: -1, ArrowDown: 1};
  if (key in ends) return ends[key];
  if (key in steps) return Math.min(Math.max(from + steps[key], 0), spans.length - 1);
  if (key in lines) return nextLine(spans, from, lines[key]);
  return undefined;
}

// The index of the token above (direction -1) or below (1) the one at `from`; the same if there is none.
function nextLine(spans, from, direction) {
  const here = spans[from].getClientRects()[0];
  let best = from, least = Infinity;
  for (const [index, span] of spans.entries()) {
    const there = span.getClientRects()[0];
    const lines = (there.top - here.top) * direction / here.height;
    const distance = 1000 * here.height * lines + Math.abs(there.left - here.left);
    if (lines > 0.5 && distance < least) [best, least] = [index, distance];
  }
  return best;
}

// Lets clicks and keys choose tokens of a list, "text" or "source".
function listen(list) {
  byId(list).addEventListener("click", (event) => {
    const span = event.target.closest(".token");
    if (span) choosers[list](Number(span.dataset.index));
  });
  byId(list).addEventListener("keydown", (event) => {
    const spans = [...byId(list).children];
    const to = moved(event.key, spans, list === "text" ? state.token : state.source);
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choosers[list](to);
    spans[to].focus();
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// What the model expected

const HEADINGS = {masked: "What may stand here", tagging: "Which label it gets", classification: "Which label it gets",
                  answers: "Where the answer begins, or ends"};

function drawExpected() {
  const {kind} = state.record;
  const prediction = predictionAt(state.token);
  byId("expected").querySelector("h2").textContent = HEADINGS[kind] ?? "What it expected here";
  byId("facts").replaceChildren(...(prediction ? factsOf(prediction)
    : ["This token was given, and the model was not asked for it. Choose another."]));
  drawBars(prediction ? rowsOf(prediction) : []);
}

// The sentences above the bars, as nodes.
function factsOf({at, entropy, rank, p}) {
  const choices = Math.pow(2, entropy);
  const among = `as unsure as among ${choices < 10 ? choices.toFixed(1) : Math.round(choices)} equal choices`;
  const unsure = ["Entropy ", make("b", {}, `${entropy.toFixed(2)} bits`), `: ${choices < 1.05 ? "sure" : among}.`];
  if (p === null) return unsure;
  const there = make("code", {}, visible(thereAt(at)));
  if (state.record.labels.length) return [there, " has ", make("b", {}, percent(p)), ". ", ...unsure];
  const place = rank === 0 ? "the likeliest" : `number ${rank + 1} of its list`;
  return [there, " had ", make("b", {}, percent(p)), ` and was ${place}: `,
          make("b", {}, `${(-Math.log2(Math.max(p, 1e-30))).toFixed(2)} bits`), " of surprise. ", ...unsure];
}

// What stands where a prediction was made: a token, or a label.
function thereAt(at) {
  const {kind, labels, tokens} = state.record;
  return (LABELLED.includes(kind) || kind === "classification" ? labels[at] ?? labels[0] : tokens[at]) ?? "";
}

// The rows of the bars, [text, probability, class]: the likeliest, the one that is there, and all others as one.
function rowsOf({at, rank, p, top}) {
  const rows = top.map(([text, share], index) => [visible(text), share, index === rank ? "there" : ""]);
  if (rank !== null && rank >= top.length) rows.push([visible(thereAt(at)), p, "there"]);
  const rest = 1 - rows.reduce((sum, [, share]) => sum + share, 0);
  return rest > 0.0005 ? [...rows, ["rest", rest, "rest"]] : rows;
}

function drawBars(rows) {
  const bars = byId("bars");
  bars.style.setProperty("--letters", Math.max(...rows.map(([text]) => text.length)));  // all begin at one place
  bars.style.setProperty("--most", Math.max(0.25, ...rows.map(([, share]) => share)));  // what fills the width
  bars.replaceChildren(...rows.map(([text, share, name]) => {
    const row = make("li", {class: name}, make("code", {title: text}, text), make("span", {class: "bar"}),
                     make("span", {class: "share"}, percent(share)));
    if (name === "there") row.setAttribute("aria-current", "true");
    row.style.setProperty("--share", share);
    return row;
  }));
}

// ---------------------------------------------------------------------------------------------------------------------
// The logit lens

function drawLens() {
  const {lens, kind} = state.record;
  const found = lens?.top[kind === "classification" ? 0 : state.predicted[state.token]];
  byId("lens").hidden = !found;
  if (!found) return;
  const there = predictionAt(state.token).p === null ? null : thereAt(state.token);
  const rows = lens.layers.map((name, layer) => make("tr", {}, make("th", {scope: "row"}, name),
                                                     ...found[layer].map((likely) => lensCell(likely, there))));
  byId("lens").querySelector("tbody").replaceChildren(...rows);
  byId("lens").querySelector("thead").replaceChildren(make("tr", {}, make("th", {scope: "col"}, "after"),
    ...["likeliest", "second", "third"].map((name) => make("th", {scope: "col"}, name))));
}

function lensCell([text, share], there) {
  const cell = make("td", {class: text === there ? "there" : ""}, make("code", {}, visible(text)), " ",
                    make("span", {class: "share"}, percent(share)));
  cell.style.setProperty("--tint", share);
  return cell;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: weights

// The bytes in a text of base64, which are deflated. Rejects where the browser or the text does not allow it.
async function inflated(text) {
  if (typeof DecompressionStream === "undefined") throw new Error(NO_STREAM);
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Unpacks the attention of a record and draws its heads. It comes after the first drawing: it is most of the record.
async function inflateAll(record) {
  let maps;
  try {
    maps = await Promise.all(record.attention.map(({data}) => inflated(data)));
  } catch (error) {
    byId("maps").replaceChildren(make("p", {class: "error"}, error.message));
    return;
  }
  if (record !== state.record) return;  // another was shown meanwhile
  state.maps = maps;
  drawHeads();
  drawTints();
}

// The row of a map that belongs to the chosen token: the position from which the model predicted it, or, for a model
// that reads in both directions, its own. Undefined for the first token of a text, which nothing predicted.
function rowOf(map) {
  const {name, rows} = state.record.attention[map];
  const row = name === "encoder" ? state.source : state.token - (isCausal() ? 1 : 0);
  return row >= 0 && row < rows ? row : undefined;
}

// The weights with which a head looks from a row at each column, Float32Array. head: as in `state`.
function weightsOf({map, layer, head}, row) {
  const {layers, heads, rows, columns} = state.record.attention[map];
  const found = new Float32Array(columns);
  const some = head < 0 ? Array.from({length: layers * heads}, (_, i) => i) : [layer * heads + head];
  for (const one of some) {
    const start = (one * rows + row) * columns;
    for (let column = 0; column < columns; column++) found[column] += state.maps[map][start + column];
  }
  return found.map((value) => value / 255 / some.length);
}

// The head of a map that is shown: the one pointed at, or else the mean of all.
function headOf(map) {
  return state.head?.map === map ? state.head : {map, layer: -1, head: -1};
}

// The index of the map with this name, once it is inflated; else -1.
function mapNamed(name) {
  return state.maps.length ? state.record.attention.findIndex((attention) => attention.name === name) : -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: heads as small pictures

// Draws all heads, a few at a time: in between, the browser answers clicks.
async function drawHeads() {
  const {record} = state;
  byId("maps").replaceChildren(...record.attention.map(mapOf));
  markRows();
  let until = performance.now() + AT_ONCE;
  for (const button of byId("maps").querySelectorAll("button.head")) {
    drawHead(button);
    if (performance.now() < until) continue;
    await new Promise((done) => setTimeout(done));
    if (record !== state.record) return;  // another was shown meanwhile
    until = performance.now() + AT_ONCE;
  }
}

function mapOf(attention, map) {
  const name = patchGrid() ? "From the chosen patch to the picture, which each square shows" : MAP_NAMES[attention.name];
  const rows = Array.from({length: attention.layers}, (_, layer) => make("div", {class: "layer"},
    make("span", {class: "name"}, `block ${layer + 1}`),
    ...Array.from({length: attention.heads}, (_, head) => headButton(attention, map, layer, head))));
  const mean = make("button", {type: "button", class: "mean", "aria-pressed": "false", tabindex: map ? "-1" : "0",
                               "data-map": map, "data-layer": -1, "data-head": -1}, "mean of all heads");
  return make("div", {class: `map ${attention.name}`, role: "group", "aria-label": name},
              make("h3", {}, name), mean, ...rows);
}

function headButton(attention, map, layer, head) {
  return make("button", {type: "button", class: "head", "aria-pressed": "false", tabindex: "-1", "data-map": map,
                         "data-layer": layer, "data-head": head, title: `block ${layer + 1}, head ${head + 1}`,
                         "aria-label": `block ${layer + 1}, head ${head + 1}`}, make("canvas"));
}

function headOfButton({dataset}) {
  return {map: Number(dataset.map), layer: Number(dataset.layer), head: Number(dataset.head)};
}

// Draws a head: all rows and columns; if it looks at a picture, the chosen token's row as a grid.
function drawHead(button) {
  const head = headOfButton(button);
  const {rows, columns, grid} = state.record.attention[head.map];
  const canvas = button.firstChild;
  if (grid) {
    const row = rowOf(head.map);
    paint(canvas, grid[0], grid[1], row === undefined ? new Float32Array(columns) : scaled(weightsOf(head, row)));
    return;
  }
  const [height, width] = [Math.min(rows, HEAD_PIXELS), Math.min(columns, HEAD_PIXELS)];
  canvas.classList.toggle("coarse", Math.max(height, width) < HEAD_PIXELS / 2);
  paint(canvas, height, width, pooled(head, height, width));
}

// The square roots of a head's weights, the largest of those that fall on a pixel: (height * width).
function pooled({map, layer, head}, height, width) {
  const {heads, rows, columns} = state.record.attention[map];
  const start = (layer * heads + head) * rows * columns;
  const most = new Uint8Array(height * width);
  const places = Uint32Array.from({length: columns}, (_, column) => Math.floor(column * width / columns));
  for (let row = 0; row < rows; row++) {
    const [from, to] = [start + row * columns, Math.floor(row * height / rows) * width];
    for (let column = 0; column < columns; column++) {
      const value = state.maps[map][from + column];
      if (value > most[to + places[column]]) most[to + places[column]] = value;
    }
  }
  return Float32Array.from(most, (value) => Math.sqrt(value / 255));
}

// The values in proportion to the largest, which becomes 1.
function scaled(values) {
  const most = Math.max(...values, 1e-9);
  return values.map((value) => value / most);
}

// Fills a canvas of height x width pixels with a colour, as opaque as the values, 0 to 1.
function paint(canvas, height, width, values, colour = BLUE) {
  Object.assign(canvas, {width, height});
  const pixels = new Uint32Array(height * width);
  for (let i = 0; i < pixels.length; i++) pixels[i] = Math.round(255 * values[i]) << 24 | colour;
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), width, height), 0, 0);
}

// Marks the chosen token's row on the heads of each map, and draws those anew that show this row only.
function markRows() {
  for (const [map, group] of [...byId("maps").querySelectorAll(".map")].entries()) {
    const {rows, grid} = state.record.attention[map];
    const row = rowOf(map);
    group.classList.toggle("rowless", row === undefined || Boolean(grid));
    group.style.setProperty("--row", ((row ?? 0) + 0.5) / rows);
    if (grid) group.querySelectorAll("button.head").forEach(drawHead);
  }
}

// Shows on the text what a head looked at; null: shows how surprising the tokens were.
function look(head) {
  state.head = head;
  drawTints();
}

// Keeps a head, so that it stays when the pointer leaves it. null: none.
function keep(head) {
  state.kept = head;
  for (const button of byId("maps").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Boolean(head) && sameHead(head, headOfButton(button)));
  }
  look(head);
}

function sameHead(one, other) {
  return one?.map === other?.map && one?.layer === other?.layer && one?.head === other?.head;
}

function listenToHeads() {
  const maps = byId("maps");
  const at = (event) => event.target.closest("button");
  maps.addEventListener("pointerover", (event) => {
    if (at(event) && event.pointerType !== "touch") look(headOfButton(at(event)));
  });
  maps.addEventListener("pointerout", (event) => { if (event.pointerType !== "touch") look(state.kept); });
  maps.addEventListener("focusin", (event) => {
    if (at(event)?.matches(":focus-visible")) look(headOfButton(at(event)));
  });
  maps.addEventListener("focusout", () => look(state.kept));
  maps.addEventListener("click", (event) => {
    if (at(event)) keep(sameHead(state.kept, headOfButton(at(event))) ? null : headOfButton(at(event)));
  });
  maps.addEventListener("keydown", (event) => {
    const buttons = [...maps.querySelectorAll("button")];
    const to = buttons.length && moved(event.key, buttons, buttons.indexOf(at(event)));
    if (!to && to !== 0) return;
    event.preventDefault();
    at(event).setAttribute("tabindex", "-1");
    buttons[to].setAttribute("tabindex", "0");
    buttons[to].focus();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") keep(null); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention and surprise on the text

// Tints the tokens by surprise, or by what a head looked at, and says which.
function drawTints() {
  const {head} = state;
  const row = head && rowOf(head.map);
  const weights = head && row !== undefined ? weightsOf(head, row) : null;
  tint("text", weights ? (isOn("text") ? scaled(weights) : []) : head ? [] : surprises());
  tint("source", weights && isOn("source") ? scaled(weights) : []);
  byId("reading").classList.toggle("by-head", Boolean(head));
  drawLegend(weights);
  drawLooked(weights);
  drawPicture();
  drawLinks();
}

// Whether the head that is shown looks at the tokens of this list, "text" or "source".
function isOn(list) {
  const names = {text: ["self"], source: ["cross", "encoder"]};
  return names[list].includes(state.record.attention[state.head.map].name);
}

// Sets the tints of a list's tokens, 0 to 1, by index.
function tint(list, values) {
  for (const [index, span] of [...byId(list).children].entries()) span.style.setProperty("--tint", values[index] ?? 0);
}

// For each token how surprising it was: 1 for MOST_BITS. For a [MASK], how unsure the model is of the likeliest.
function surprises() {
  const {kind, tokens} = state.record;
  return tokens.map((_, index) => {
    const prediction = predictionAt(index);
    if (!prediction || kind === "classification" || kind === "masked" && prediction.p !== null) return 0;
    const bits = -Math.log2(Math.max(prediction.p ?? prediction.top[0][1], 1e-30));
    return Math.min(1, bits / MOST_BITS);
  });
}

function drawLegend(weights) {
  const {kind, written, tokens} = state.record;
  const most = weights ? Math.max(...weights) : 0;
  const surprise = isCausal() ? ["expected", "surprising"] : ["sure", "unsure"];
  const [low, high] = state.head ? ["0 %", percent(most)] : surprise;
  const nodes = [make("span", {}, low), make("span", {class: "scale"}), make("span", {}, high)];
  if (!state.head && kind === "classification") nodes.length = 0;
  if (written < tokens.length) nodes.push(make("span", {class: "written"}, "written by the model"));
  byId("legend").replaceChildren(...nodes);
}

// Says in words what the head that is shown looked at, or how to begin.
function drawLooked(weights) {
  const {head, record} = state;
  if (!head) {
    byId("looked").textContent = "Choose a token with a click or the arrow keys.";
    return;
  }
  const name = head.head < 0 ? "mean of all heads" : `block ${head.layer + 1}, head ${head.head + 1}`;
  if (!weights) {
    byId("looked").textContent = `${name}: nothing predicted the first token; choose another.`;
    return;
  }
  const attention = record.attention[head.map];
  const from = visible(attention.row_tokens[rowOf(head.map)] ?? "");
  const places = [...weights.keys()].filter((i) => weights[i] > 0.005).sort((a, b) => weights[b] - weights[a]);
  const where = (place) => attention.grid ? `row ${Math.floor(place / attention.grid[1]) + 1}, column`
    + ` ${place % attention.grid[1] + 1}` : visible(attention.column_tokens[place] ?? "");
  byId("looked").replaceChildren(`${name} looked from `, make("code", {}, from), " at ",
    ...places.slice(0, 4).flatMap((place, i) => [i ? ", " : "", make("code", {}, where(place)),
                                                 ` ${percent(weights[place])}`]));
}

// ---------------------------------------------------------------------------------------------------------------------
// The picture, and the lines between two sentences

// Lets a click on the picture choose the patch there.
function listenToPicture() {
  byId("picture").addEventListener("click", ({currentTarget, clientX, clientY}) => {
    const grid = patchGrid();
    if (!grid) return;
    const box = currentTarget.getBoundingClientRect();
    const [row, column] = [(clientY - box.top) / box.height, (clientX - box.left) / box.width]
      .map((share, axis) => Math.min(Math.floor(share * grid[axis]), grid[axis] - 1));
    choose(state.record.tokens.length - grid[0] * grid[1] + row * grid[1] + column);
  });
}

function drawPictureFrame() {
  const {image} = state.record;
  byId("picture").hidden = !image;
  if (image) byId("picture").querySelector("img").src = image;
}

// Lays over the picture what the chosen token looked at: the less, the darker.
function drawPicture() {
  const map = mapNamed("image");
  const canvas = byId("picture").querySelector("canvas");
  const row = map < 0 ? undefined : rowOf(map);
  canvas.hidden = row === undefined;
  if (canvas.hidden) return;
  const [height, width] = state.record.attention[map].grid;
  const dark = scaled(weightsOf(headOf(map), row)).map((value) => 0.8 * (1 - Math.sqrt(value)));
  paint(canvas, height, width, dark, BLACK);
}

// Draws lines from the tokens of a translation to those of its source: strong ones for the chosen token.
function drawLinks() {
  const map = mapNamed("cross");
  const svg = byId("links");
  svg.replaceChildren();
  if (map < 0) return;
  const paper = byId("paper").getBoundingClientRect();
  svg.setAttribute("width", paper.width);
  svg.setAttribute("height", paper.height);
  const boxes = Object.fromEntries(["text", "source"].map((list) =>
    [list, [...byId(list).children].map((span) => span.getClientRects()[0])]));
  const chosen = rowOf(map);
  const {rows} = state.record.attention[map];
  for (let row = 0; row < rows; row++) {
    const below = boxes.text[row + 1];  // the token that this row predicted
    if (!below) continue;
    const weights = weightsOf(headOf(map), row);
    const most = Math.max(...weights);
    weights.forEach((weight, column) => {
      const above = boxes.source[column];
      const opacity = row === chosen ? weight / most : weight / 3;
      if (weight > LEAST_LINK && above) svg.append(link(above, below, paper, opacity, row === chosen));
    });
  }
}

function link(above, below, paper, opacity, isChosen) {
  const [x1, x2] = [above, below].map((box) => (box.left + box.right) / 2 - paper.left);
  return makeSvg("line", {x1, y1: above.bottom - paper.top, x2, y2: below.top - paper.top,
                          class: isChosen ? "chosen" : "", "stroke-opacity": opacity});
}

// ---------------------------------------------------------------------------------------------------------------------
// The embedding

function drawEmbedding() {
  const {embedding} = state.record;
  byId("embedding").hidden = !embedding;
  if (!embedding) return;
  const {names, xy, explained} = embedding;
  const section = byId("embedding");
  section.querySelector(".hint").textContent = `The vectors of ${names.length} tokens, seen from the side on which they`
    + ` differ most: ${percent(explained[0])} of their variance from left to right, ${percent(explained[1])} upwards.`;
  const svg = section.querySelector("svg");
  const width = section.clientWidth, height = Math.min(420, width);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", `A scatter of the vectors of ${names.length} tokens`);
  const [across, up] = [0, 1].map((axis) => axisOf(xy.map((point) => point[axis])));
  svg.replaceChildren(...names.map((name, i) => {
    const [x, y] = [across(xy[i][0]), up(xy[i][1])];
    return makeSvg("text", {x: 16 + x * (width - 32), y: height - 12 - y * (height - 24),
                            "text-anchor": x < 0.2 ? "start" : x > 0.8 ? "end" : "middle"}, visible(name));
  }));
  markEmbedding();
}

// Returns a function from the values to 0 to 1.
function axisOf(values) {
  const least = Math.min(...values), most = Math.max(...values);
  return (value) => most > least ? (value - least) / (most - least) : 0.5;
}

function markEmbedding() {
  const {embedding, tokens} = state.record;
  const place = embedding ? embedding.names.indexOf(tokens[state.token]) : -1;
  for (const [index, text] of [...byId("embedding").querySelectorAll("text")].entries()) {
    text.classList.toggle("chosen", index === place);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The start

function redraw() {
  if (!state.record) return;
  drawLinks();
  drawEmbedding();
}

listen("text");
listen("source");
byId("steps").addEventListener("click", ({target}) => {
  if (!target.value) return;
  choose(moved(target.value, [...byId("text").children], state.token));
  byId("text").children[state.token].scrollIntoView({block: "nearest"});
});
listenToHeads();
listenToPicture();
addEventListener("resize", redraw);
{
  const record = JSON.parse(byId("record").textContent);
  if (record) show(record);
}
