/** Images given by hand: dropped, pasted or chosen files, results of this page, and links to pictures elsewhere. */

import { imageTerm } from './state.js';

const KEY = 'text/x-clipmill-key'; // what a result of this page is dragged as

/** Marks a drag as one of the pair with this ``key``. */
export const dragKey = (event, key) => event.dataTransfer.setData(KEY, key);

/**
 * Listens for them. ``take(terms, beside)``: ``beside`` says whether they join the present search or begin one;
 * ``refuse(file)`` gets a file that is no image; ``combinable()`` tells whether there is a search that they could join.
 */
export function receive(zone, chooser, { take, refuse, combinable }) {
  const busy = () => document.querySelector('dialog[open]') !== null;
  const kinds = ['Files', 'text/uri-list', KEY];
  const wanted = ({ dataTransfer }) => kinds.some((kind) => dataTransfer?.types.includes(kind));
  const over = (event) => {
    if (busy() || !wanted(event)) return;
    event.preventDefault();
    zone.hidden = false;
    zone.querySelector('[data-drop=add]').hidden = !combinable();
    for (const part of zone.children) part.classList.toggle('over', part === event.target);
  };
  const given = (data, beside) => {
    const other = [...data.files].find(({ type }) => type && !type.startsWith('image/'));
    if (other) return refuse(other);
    const terms = termsOf(data);
    return terms.length ? take(terms, beside) : undefined;
  };

  document.addEventListener('dragenter', over);
  document.addEventListener('dragover', over);
  document.addEventListener('dragleave', ({ relatedTarget }) => { zone.hidden ||= !relatedTarget; });
  document.addEventListener('dragend', () => { zone.hidden = true; });
  document.addEventListener('drop', (event) => {
    if (zone.hidden) return;
    event.preventDefault();
    zone.hidden = true;
    given(event.dataTransfer, event.target.dataset?.drop === 'add');
  });
  document.addEventListener('paste', (event) => {
    if (busy() || !event.clipboardData?.files.length) return;
    event.preventDefault();
    given(event.clipboardData, true);
  });
  chooser.addEventListener('change', () => {
    given({ files: chooser.files, getData: () => '' }, true);
    chooser.value = '';
  });
}

function termsOf(data) {
  if (data.files.length) return [...data.files].map(imageTerm);
  const key = data.getData(KEY);
  if (key) return [{ kind: 'key', value: key, weight: 1 }];
  const url = data.getData('text/uri-list').split(/\r?\n/).find((line) => /^https?:/.test(line));
  return url ? [{ kind: 'url', value: url, weight: 1 }] : [];
}
