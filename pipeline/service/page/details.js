/** The dialog of one result or candidate: its picture, all that is known of it, and where to go from there. */

import { ask, asProblem, showPicture } from './api.js';
import { definitions, figure, make, panel, sharpen, words } from './view.js';

/**
 * Readies ``dialog``. ``step(by)`` goes to a neighbour, ``leave()`` is called when the dialog was closed by hand.
 * Returns show(item, actions): actions are [label, function(button)] pairs; the item of view.js, of which a pair's
 * ``record`` is a path to fetch and a candidate's the record itself.
 */
export function details(dialog, { step, leave }) {
  const part = (selector) => dialog.querySelector(selector);
  let running = null;
  let shown = null;

  part('img').addEventListener('load', sharpen);
  dialog.addEventListener('close', () => {
    running?.abort();
    shown = null;
    leave();
  });
  dialog.addEventListener('click', (event) => {
    const by = event.target.closest('[data-step]')?.dataset.step;
    if (by) step(Number(by));
    else if (event.target === dialog || event.target.closest('.close')) dialog.close();
  });
  dialog.addEventListener('keydown', (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === 'ArrowLeft' || event.key === 'ArrowRight') {
      event.preventDefault();
      step(event.key === 'ArrowLeft' ? -1 : 1);
    } else if (event.key === 'Tab') {
      keepInside(event, [...dialog.querySelectorAll('button:enabled, a[href], summary')]);
    }
  });

  async function record(item) {
    const area = part('.record');
    if (typeof item.record !== 'string') return area.replaceChildren(table(item.record));
    running = new AbortController();
    const { signal } = running;
    area.replaceChildren(make('p', { class: 'soft' }, 'Reading the record…'));
    try {
      const found = await ask(item.record, { signal });
      caption(item.caption ?? find(found, 'caption'));
      area.replaceChildren(table(found));
    } catch (error) {
      if (signal.aborted) return;
      const again = make('button', { type: 'button', click: () => record(item) }, 'Try again');
      area.replaceChildren(panel(asProblem(error), again));
    }
  }

  const trouble = (error) => part('.record').prepend(panel(asProblem(error)));

  function caption(text) {
    const score = Number.isFinite(shown.similarity) ? make('span', { class: 'figure' }, figure(shown.similarity)) : '';
    const told = text ? words(text) : make('span', { class: 'soft' }, 'no caption');
    part('#details-caption').replaceChildren(score, told);
  }

  return function show(item, actions) {
    if (shown?.id === item.id) return;
    running?.abort();
    shown = item;
    const img = part('img');
    img.removeAttribute('src');
    img.alt = (item.caption ?? '').slice(0, 300);
    showPicture(img, item.path);
    caption(item.caption);
    part('.buttons').replaceChildren(...actions.map(([label, act]) => {
      const click = ({ currentTarget }) => act(currentTarget).catch(trouble);
      return make('button', { type: 'button', click, disabled: !act }, label);
    }));
    record(item);
    if (!dialog.open) dialog.showModal();
  };
}

/** Tab goes round within a dialog. */
function keepInside(event, inside) {
  const [first, last] = [inside[0], inside.at(-1)];
  const at = document.activeElement;
  if (event.shiftKey ? at === first || !inside.includes(at) : at === last) {
    event.preventDefault();
    (event.shiftKey ? last : first).focus();
  }
}

const isObject = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);

/** The value under ``name`` in a record or in one of its sections. */
function find(record, name) {
  return record[name] ?? Object.values(record).filter(isObject).map((section) => section[name]).find(Boolean);
}

/** A record: its plain values first, then its sections. */
function table(record) {
  const entries = Object.entries(record);
  const plain = entries.filter(([, value]) => !isObject(value));
  const sections = entries.filter(([, value]) => isObject(value) && Object.keys(value).length);
  return make(
    'div', {},
    definitions(plain.map(([name, value]) => [name, told(value)])),
    ...sections.map(([name, section]) => make('section', {}, make('h3', {}, words(name)), table(section))),
  );
}

function told(value) {
  if (value === null || value === '') return make('span', { class: 'soft' }, '–');
  if (typeof value === 'number') return String(Number(value.toPrecision(7))); // float32 has no more
  if (typeof value !== 'string') return String(value);
  const shown = words(value, 20_000);
  return /^https?:\/\/[^\s]+$/.test(value)
    ? make('a', { href: value, target: '_blank', rel: 'noopener noreferrer nofollow' }, shown) : shown;
}

/** Copies ``text``; also where the page is served without TLS to another machine, which has no navigator.clipboard. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make('textarea', { class: 'aside', 'aria-hidden': 'true' });
    field.value = text;
    button.after(field);
    field.select();
    document.execCommand('copy');
    field.remove();
    button.focus();
  }
  const label = button.textContent;
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = label; }, 1500);
}
