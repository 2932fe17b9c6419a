/** Elements made of data. Captions are hostile: whatever comes from the server becomes text, never markup. */

import { showPicture } from './api.js';
import { dragKey } from './given.js';

/** A tag with attributes, listeners (functions) and children; strings among them become text. */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ''));
  return made;
}

/** Text in a direction of its own, at most ``most`` characters, with pictures for control characters. */
export function words(text, most = Infinity) {
  const cut = text.length > most ? `${text.slice(0, most)}…` : text;
  const shown = cut.replace(/[\0-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
  return make('bdi', { dir: 'auto' }, shown);
}

export const figure = (number, digits = 3) => (Number.isFinite(number) ? number.toFixed(digits) : '–');
export const many = (number) => (Number.isFinite(number) ? number.toLocaleString('en') : '–');

// ---- the grid ----

/**
 * An item is {id, href, path, caption, similarity, rank, width, height}: a result or a candidate. ``open(id)`` is
 * called for a plain click; the link itself opens it in another tab.
 */
export function grid(items, open, { label, asCaptions = false } = {}) {
  const list = items.map((item) => (asCaptions ? captionRow : tile)(item, open));
  return make('ol', { class: asCaptions ? 'captions' : 'grid', 'aria-label': label }, ...list);
}

function tile(item, open) {
  const made = make('li', {}, link(item, open, picture(item), below(item)));
  // Rows of one height, filled from side to side. What is very long or very tall is cut here, but not in the details.
  made.style.setProperty('--ratio', Math.min(2.2, Math.max(0.6, (item.width || 1) / (item.height || 1))));
  return made;
}

function captionRow(item, open) {
  return make('li', {}, link(item, open, picture(item), below(item, 1000)));
}

function link(item, open, ...children) {
  const click = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    open(item.id);
  };
  const dragstart = (event) => dragKey(event, item.key);
  const drag = item.key ? { dragstart } : { draggable: 'false' };
  return make('a', { class: 'item', href: item.href, tabindex: -1, 'data-id': item.id, click, ...drag }, ...children);
}

function picture({ path, width, height }) {
  const img = make('img', { alt: '', loading: 'lazy', decoding: 'async', width, height, load: sharpen });
  showPicture(img, path);
  return make('span', { class: 'frame' }, img);
}

/** Shows the pixels of a picture that is enlarged much. */
export const sharpen = ({ target }) => target.classList.toggle('pixels', target.naturalWidth <= 64);

function below({ similarity, rank, caption }, most = 240) {
  return make(
    'span', { class: 'below' },
    make('span', { class: 'figure', title: `rank ${rank}` }, figure(similarity)), ' ',
    caption ? make('span', { class: 'caption' }, words(caption, most)) : null,
  );
}

// ---- the rest ----

/** A word to the user where results would be. */
export function message(title, text) {
  return make('section', { class: 'welcome' }, make('h2', {}, title), make('p', {}, text));
}

/** Names and what they stand for, a text or an element; null for none. */
export function definitions(entries) {
  if (!entries.length) return null;
  return make('dl', {}, ...entries.flatMap(([name, value]) => [make('dt', {}, words(name)), make('dd', {}, value)]));
}

/** A problem in the server's words, with what can be done. */
export function panel({ problem, expected, actual, remedy }, ...buttons) {
  const facts = Object.entries({ expected, actual }).filter(([, told]) => told);
  const shown = facts.map(([name, told]) => [name, words(told, 2000)]);
  return make(
    'section', { class: 'problem', role: 'alert' },
    make('h2', {}, words(problem)),
    definitions(shown),
    remedy ? make('p', { class: 'remedy' }, words(remedy)) : null,
    buttons.length ? make('p', { class: 'buttons' }, ...buttons) : null,
  );
}

/** An index in figures, and how to ask it: what is there before anything was asked. */
export function welcome(index) {
  const head = ['', 'vectors', 'recall@10', 'ms a query', 'kind'].map((name) => make('th', { scope: 'col' }, name));
  const rows = (index.files ?? []).map((file) => make(
    'tr', {},
    make('th', { scope: 'row' }, file.modality === 'text' ? 'captions' : 'images'),
    ...[many(file.count), figure(file.recall_at_10), figure(file.ms_per_query, 2), file.factory].map((told) => (
      make('td', {}, told)
    )),
  ));
  return make(
    'section', { class: 'welcome' },
    make('h2', {}, `${many(index.count)} pairs`, make('small', {}, ` by ${index.model ?? index.name}`)),
    make('p', {}, 'Describe what you look for, or drop, paste or choose an image. ',
      'Both together make “this image, but red”; a minus before a text means “not that”.'),
    rows.length ? make('table', {}, make('thead', {}, make('tr', {}, ...head)), make('tbody', {}, ...rows)) : null,
    make('p', { class: 'keys' }, make('kbd', {}, '/'), ' search ', make('kbd', {}, '← ↑ ↓ →'), ' move ',
      make('kbd', {}, 'Enter'), ' open ', make('kbd', {}, 'Esc'), ' close'),
  );
}
