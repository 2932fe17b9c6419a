/**
 * The page: form -> state, which is kept in the URL -> request -> results. Whatever the user does ends in go(changes);
 * whatever is on the screen comes of render(). No library, no build step, nothing from elsewhere.
 */

import { ask, asProblem, bytes, tokensFrom } from './api.js';
import { complete } from './completions.js';
import { copy, details } from './details.js';
import { candidates, sections } from './generated.js';
import { receive } from './given.js';
import { movable, slash, tabKeys } from './keys.js';
import { DEFAULTS, NUMBERS, imageTerm, images, isKey, question, read, smaller, write } from './state.js';
import { chips } from './terms.js';
import { tokenDialog } from './token.js';
import { grid, make, many, message, panel, welcome, words } from './view.js';

const $ = (id) => document.getElementById(id);
const main = $('main');
const TRIES = 5; // of a request that a busy server turned away
const PROMPTS = 30; // generated prompts in one go

let state = read(location.hash);
let indices = []; // of GET /v1/indices
let items = []; // what is on the screen, as view.js has it
let asked = null; // the state that they answer, written
let running = null; // the AbortController of the request under way
let tries = 0;
let retry = 0; // timer

const index = () => indices.find(({ name }) => name === state.index) ?? indices[0];
const generated = () => state.view === 'generated';
const href = (open) => `#${write({ ...state, open })}`;
const pair = (key, rest = '') => `v1/images/${key}${rest}?index=${encodeURIComponent(index().name)}`;

// ---- state ----

/** Goes on to a state, as a step that the back button undoes. Nothing happens where nothing changes. */
function go(changes, { replace = false } = {}) {
  const next = { ...state, ...changes };
  const url = `#${write(next)}`;
  if (url === `#${write(state)}`) return;
  state = next;
  tries = 0;
  if (replace) history.replaceState(history.state, '', url);
  else history.pushState({ opened: Boolean(changes.open) }, '', url);
  render();
}

/** What the form says: the terms with the text that is being written, the filter and the numbers. */
function written() {
  const text = $('text').value.trim();
  if (generated()) return { prompt: text, open: null };
  const number = (id) => (Number.isNaN($(id).valueAsNumber) ? DEFAULTS[id] : $(id).valueAsNumber);
  const numbers = Object.fromEntries(NUMBERS.map((id) => [id, number(id)]));
  const not = text.startsWith('-') && text.slice(1).trim(); // "-red": not red
  const terms = not ? [...state.terms, { kind: 'text', value: not, weight: -1 }] : state.terms;
  return { terms, text: not ? '' : text, where: $('where').value.trim(), open: null, ...numbers };
}

const submit = () => go(written());

/** The search with these terms instead; what is being written joins them. */
function setTerms(terms, more = {}) {
  const now = written();
  const further = now.terms?.slice(state.terms.length) ?? [];
  go({ ...now, terms: [...terms, ...further], view: generated() ? 'image' : state.view, ...more });
}

/** Keeps the text as a term of its own, so that another can be written. */
function another() {
  const now = written();
  const terms = now.text ? [...now.terms, { kind: 'text', value: now.text, weight: 1 }] : now.terms;
  go({ ...now, terms, text: '' });
  $('text').focus();
}

function render() {
  const first = state.text || state.terms.find(({ kind }) => kind === 'text')?.value;
  document.title = first ? `${first.slice(0, 60)} · clipmill` : 'clipmill';
  $('index').closest('label').hidden = indices.length < 2 || generated();
  if (index()) $('index').value = index().name;
  for (const tab of document.querySelectorAll('[role=tab]')) {
    const { view } = tab.dataset;
    tab.setAttribute('aria-selected', String(view === state.view));
    tab.tabIndex = view === state.view ? 0 : -1;
    tab.disabled = view !== 'generated' && index() !== undefined && !index().modalities.includes(view);
  }
  for (const part of document.querySelectorAll('.searching')) part.hidden = generated();
  const none = generated() ? 'Prompts that contain…' : 'Describe a picture, or drop one here';
  $('text').placeholder = state.terms.length && !generated() ? 'and…' : none;
  $('text').value = generated() ? state.prompt : state.text;
  $('where').value = state.where;
  for (const id of NUMBERS) $(id).value = state[id] ?? '';
  unfold($('more').getAttribute('aria-expanded') === 'true' || NUMBERS.some((id) => id !== 'k' && state[id] !== null));
  drawTerms();
  if (!state.open) $('details').close();
  if (asked !== write({ ...state, open: null })) search();
  else open();
}

/** The chips; the control that had the focus keeps it. */
function drawTerms() {
  const controls = () => [...$('terms').querySelectorAll('button, input')];
  const at = controls().indexOf(document.activeElement);
  $('terms').replaceChildren(...(index() ? chips(state.terms, setTerms, pair) : []));
  if (at >= 0) (controls()[at] ?? $('text')).focus();
}

function unfold(yes) {
  $('more').setAttribute('aria-expanded', String(yes));
  $('extra').hidden = !yes || generated();
}

// ---- requests ----

/** Does ``work(signal)`` instead of what is under way; its failure becomes a panel with a way to try ``again``. */
async function run(work, again) {
  running?.abort();
  clearTimeout(retry);
  const mine = new AbortController();
  running = mine;
  main.setAttribute('aria-busy', 'true');
  $('problem').replaceChildren();
  filterProblem(null);
  try {
    await work(mine.signal);
    if (mine === running) tries = 0;
  } catch (error) {
    if (mine === running) fail(error, again);
  }
  if (mine === running) main.removeAttribute('aria-busy');
}

/** Looks for what the state names. */
function search() {
  asked = write({ ...state, open: null });
  if (generated()) return browse(PROMPTS);
  const lost = state.terms.some(({ kind, value }) => kind === 'image' && !images.has(value));
  if (lost || !index() || !(state.terms.length || state.text)) return run(async () => idle(lost), search);
  return run(async (signal) => found(await ask('v1/search', { body: await question(state), signal })), search);
}

function found({ results, version, ms }) {
  if (version !== index().version) load().catch(() => {}); // a newly published one: its figures
  items = results.map((result) => {
    const { key } = result;
    return { ...result, id: key, path: pair(key), record: pair(key, '/record'), href: href(key) };
  });
  const number = `${items.length || 'no'} result${items.length === 1 ? '' : 's'} of ${many(index().count)} pairs`;
  const { encode, search: searching, total } = ms;
  say(`${number} · ${total.toFixed(0)} ms`, `encoding ${encode.toFixed(1)} ms, search ${searching.toFixed(1)} ms`);
  put(items.length ? grid(items, (key) => go({ open: key }), { label: 'Results', asCaptions: state.view === 'text' })
    : message('Nothing found', 'Loosen the filter or the least similarity, or take a term away.'));
}

/** Shows generated pictures of up to ``limit`` prompts. */
function browse(limit) {
  return run(async (signal) => {
    const wanted = new URLSearchParams({ prompt: state.prompt, limit });
    const prompts = candidates(await ask(`v1/generated?${wanted}`, { signal }), href);
    items = prompts.flatMap(([, some]) => some);
    say(`${prompts.length || 'no'} prompt${prompts.length === 1 ? '' : 's'}, ${items.length} pictures kept`);
    const like = (prompt) => go({ view: 'image', text: prompt, terms: [], open: null });
    const more = prompts.length < limit ? null
      : make('button', { type: 'button', click: () => browse(limit + PROMPTS) }, 'More prompts');
    const none = state.prompt ? 'No prompt contains this text.' : 'Those that clipmill generate makes are shown here.';
    const empty = prompts.length ? null : message('No generated pictures', none);
    put(...sections(prompts, (id) => go({ open: id }), like), more, empty);
  }, () => browse(limit));
}

/** What is shown where there is nothing to ask. */
function idle(lost) {
  items = [];
  say('');
  if (lost) {
    const why = 'This link holds an image that only the page knows on which it was given';
    put(message(why, 'Give it here again, or take its term away.'));
  } else {
    const none = () => message('No index is published yet', 'Run clipmill index, and load this page again.');
    put(index() ? welcome(index()) : none());
  }
}

/** Puts ``parts`` where the results are; the focus stays there if it was there. */
function put(...parts) {
  const within = $('results').contains(document.activeElement);
  $('results').replaceChildren(...parts.filter(Boolean));
  const first = main.querySelector('.item');
  if (first) first.tabIndex = 0;
  if (within) first?.focus();
  scrollTo(0, 0);
  open();
}

function say(text, more = '') {
  $('status').textContent = text;
  $('status').title = more;
}

// ---- problems ----

function fail(error, again) {
  const problem = asProblem(error);
  items = [];
  put();
  say('');
  if (problem.ofFilter) return filterProblem(problem);
  const press = (label, click, kind) => make('button', { type: 'button', class: kind, click }, label);
  const button = press('Try again', () => { tries = 0; again(); }, 'main');
  const heavy = problem.status === 413 && state.terms.some(({ kind }) => kind === 'image');
  const lighter = heavy ? press('Search with a smaller copy', () => run(shrink, again)) : '';
  $('problem').replaceChildren(panel(problem, lighter, button));
  if (problem.passing && tries < TRIES) {
    tries += 1;
    countdown(button, Math.max(1, Math.ceil(problem.after ?? tries)), again);
  }
  return undefined;
}

function countdown(button, seconds, again) {
  button.textContent = `Try again (by itself in ${seconds} s)`;
  retry = setTimeout(() => (seconds > 1 ? countdown(button, seconds - 1, again) : again()), 1000);
}

/** Shows beside the filter why it was refused; null: it was not. */
function filterProblem(problem) {
  const box = $('where-problem');
  const line = (name, told) => (told ? make('p', {}, name, words(told, 1000)) : null);
  box.hidden = !problem;
  $('where').setAttribute('aria-invalid', String(Boolean(problem)));
  if (!problem) return box.replaceChildren();
  say('The filter was refused');
  const { actual, expected, remedy } = problem;
  return box.replaceChildren(...[
    line('', problem.problem), line('', actual), line('expected: ', expected), line('remedy: ', remedy),
  ].filter(Boolean));
}

/** The same search with smaller copies of its images. */
async function shrink() {
  setTerms(await Promise.all(state.terms.map(async (term) => {
    if (term.kind !== 'image') return term;
    const { file } = images.get(term.value);
    return { ...imageTerm(new File([await smaller(file)], file.name)), weight: term.weight };
  })));
}

// ---- details ----

const showDetails = details($('details'), {
  step(by) {
    const at = items.findIndex(({ id }) => id === state.open);
    if (at >= 0 && items[at + by]) go({ open: items[at + by].id }, { replace: true });
  },
  leave() {
    const last = state.open;
    if (last === null) return;
    if (history.state?.opened) history.back();
    else go({ open: null }, { replace: true });
    main.querySelector(`.item[data-id="${CSS.escape(last)}"]`)?.focus();
  },
});

/** Opens or closes the dialog, as the state has it. */
function open() {
  const id = state.open;
  const isPair = !generated() && isKey(id) && index() !== undefined; // of a link, and not among the results
  const item = items.find((some) => some.id === id)
    ?? (isPair ? { id, key: id, path: pair(id), record: pair(id, '/record') } : null);
  if (!item) return $('details').close();
  const term = async () => (item.key ? { kind: 'key', value: item.key, weight: 1 }
    : imageTerm(new File([await bytes(item.path)], item.prompt.slice(0, 60))));
  const only = (view) => index()?.modalities.includes(view) && (
    async () => go({ view, terms: [await term()], text: '', open: null }));
  return showDetails(item, [
    ['More like this', only('image')],
    ['Captions like this', only('text')],
    ['Add to the search', async () => setTerms([...state.terms, await term()])],
    [item.key ? 'Copy key' : 'Copy prompt', (button) => copy(item.key ?? item.prompt, button)],
  ]);
}

// ---- start ----

function listen() {
  $('ask').addEventListener('submit', (event) => {
    event.preventDefault();
    const before = asked;
    submit();
    if (asked === before && !main.hasAttribute('aria-busy')) search(); // the same again
  });
  for (const id of ['where', ...NUMBERS]) $(id).addEventListener('change', submit);
  $('index').addEventListener('change', () => go({ ...written(), index: $('index').value }));
  $('more').addEventListener('click', () => unfold($('more').getAttribute('aria-expanded') !== 'true'));
  $('another').addEventListener('click', another);
  $('choose').addEventListener('click', () => $('file').click());
  $('tabs').addEventListener('click', ({ target: { dataset: { view } } }) => view && go({ ...written(), view }));
  for (const moved of ['popstate', 'hashchange']) {
    addEventListener(moved, () => {
      if (write(state) === write(read(location.hash))) return;
      state = read(location.hash);
      render();
    });
  }
}

function keys() {
  $('text').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && event.altKey) {
      event.preventDefault();
      another();
    } else if (event.key === 'Backspace' && !$('text').value && state.terms.length && !generated()) {
      setTerms(state.terms.slice(0, -1));
    } else if (event.key === 'ArrowDown') {
      main.querySelector('.item[tabindex="0"]')?.focus();
    }
  });
  tabKeys($('tabs'));
  slash($('text'));
  movable(main);
}

async function load(signal) {
  ({ indices } = await ask('v1/indices', { signal }));
  const option = ({ name, model, count }) => make('option', { value: name }, `${model ?? name} (${many(count)})`);
  $('index').replaceChildren(...indices.map(option));
}

function start() {
  return run(async (signal) => {
    await load(signal);
    asked = null;
    render();
  }, start);
}

tokensFrom(tokenDialog($('token')));
listen();
keys();
complete($('where'), $('columns'), () => index()?.columns ?? []);
receive($('drop'), $('file'), {
  take(terms, beside) {
    if (beside && !generated()) setTerms([...state.terms, ...terms]);
    else setTerms(terms, { text: '' });
  },
  refuse({ name, type }) {
    const remedy = 'give a picture: JPEG, PNG, WebP and the like';
    $('problem').replaceChildren(panel({ problem: `This is no image: ${name}`, actual: type, remedy }));
  },
  combinable: () => !generated() && Boolean(state.terms.length || $('text').value),
});
start();
