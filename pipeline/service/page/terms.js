/** The terms of a search as chips: a sign, what it is, a weight, and a button that takes it away. */

import { showPicture } from './api.js';
import { images } from './state.js';
import { make, words } from './view.js';

/** Chips of ``terms``. ``set(terms)`` is called with what they become; ``path(key)`` is the picture of a key. */
export function chips(terms, set, path) {
  return terms.map((term, at) => chip(
    term, (changes) => set(terms.map((other, i) => (i === at ? { ...other, ...changes } : other))),
    () => set(terms.filter((_, i) => i !== at)), path,
  ));
}

function chip({ kind, value, weight }, change, remove, path) {
  const name = nameOf(kind, value);
  const button = (label, text, click) => (
    make('button', { type: 'button', 'aria-label': `${label} ${name}`, click }, text)
  );
  const weigh = ({ target }) => {
    const size = Math.min(100, Math.abs(target.valueAsNumber || 0));
    change({ weight: weight < 0 ? -size : size });
  };
  const sign = button('Negate', weight < 0 ? '−' : '+', () => change({ weight: -weight || -1 }));
  sign.setAttribute('aria-pressed', String(weight < 0));
  return make(
    'li', { class: weight < 0 ? 'not' : null, title: name }, sign, thumbnail(kind, value, path),
    make('span', { class: 'name' }, words(name)),
    make('input', {
      type: 'number', step: 0.25, min: 0, max: 100, value: Math.abs(weight), 'aria-label': `Weight of ${name}`,
      change: weigh,
    }),
    button('Remove', '×', remove),
  );
}

function nameOf(kind, value) {
  const name = kind === 'key' ? `pair …${value.slice(-6)}` : kind === 'image' ? imageName(value) : value;
  return name.slice(0, 200);
}

const imageName = (id) => (images.has(id) ? images.get(id).file.name || 'image' : 'an image, to be given again');

function thumbnail(kind, value, path) {
  if (kind !== 'key' && !images.has(value)) return null;
  const img = make('img', { alt: '', width: 22, height: 22 });
  if (kind === 'key') showPicture(img, path(value));
  else img.src = images.get(value).url;
  return img;
}
