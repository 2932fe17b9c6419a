/** Completions of the word at the caret: the columns, while a filter is written. An ARIA combobox with a list. */

import { make } from './view.js';

/** ``words()`` are offered for ``input`` in ``list`` (both in the page already). */
export function complete(input, list, words) {
  let chosen = -1;

  /** The unfinished word before the caret, or null where no column can begin. */
  function word() {
    const before = input.value.slice(0, input.selectionStart);
    if ((before.match(/'/g) ?? []).length % 2) return null; // in a string
    const found = /[A-Za-z_]\w*$/.exec(before)?.[0] ?? '';
    return found || /(^|\b(and|or|not|by)|\()\s*$/i.test(before) ? found : null;
  }

  function close() {
    chosen = -1;
    list.hidden = true;
    input.setAttribute('aria-expanded', 'false');
    input.removeAttribute('aria-activedescendant');
  }

  function update() {
    close();
    const start = word()?.toLowerCase();
    if (start === undefined) return;
    const found = words().filter((name) => name.toLowerCase().startsWith(start) && name.toLowerCase() !== start);
    list.replaceChildren(...found.map((name, i) => {
      const mousedown = (event) => take(event, name);
      return make('li', { role: 'option', id: `column-${i}`, 'aria-selected': 'false', mousedown }, name);
    }));
    list.hidden = !found.length;
    input.setAttribute('aria-expanded', String(!list.hidden));
  }

  function mark(at) {
    const options = [...list.children];
    chosen = (at + options.length) % options.length;
    options.forEach((option, i) => option.setAttribute('aria-selected', String(i === chosen)));
    options[chosen].scrollIntoView({ block: 'nearest' });
    input.setAttribute('aria-activedescendant', options[chosen].id);
  }

  function take(event, name) {
    event.preventDefault(); // the field keeps the focus, and Enter does not search yet
    const end = input.selectionStart;
    input.setRangeText(`${name} `, end - word().length, end, 'end');
    close();
  }

  input.addEventListener('input', update);
  input.addEventListener('focus', update);
  input.addEventListener('blur', close);
  input.addEventListener('keydown', (event) => {
    if (list.hidden) return;
    if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
      event.preventDefault();
      mark(event.key === 'ArrowDown' ? chosen + 1 : Math.max(chosen, 0) - 1);
    } else if ((event.key === 'Enter' || event.key === 'Tab') && chosen >= 0) {
      take(event, list.children[chosen].textContent);
    } else if (event.key === 'Escape' || event.key === 'Enter') {
      close();
    }
  });
}
