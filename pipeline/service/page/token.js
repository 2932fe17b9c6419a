/** The dialog that asks for the token. */

/** Returns ask(refused): the token, or null where the user would not say. */
export function tokenDialog(dialog) {
  const part = (selector) => dialog.querySelector(selector);
  let given = null;
  part('form').addEventListener('submit', (event) => {
    event.preventDefault();
    given = part('input').value.trim() || null;
    dialog.close();
  });
  part('button[type=button]').addEventListener('click', () => dialog.close());
  return function ask(refused) {
    given = null;
    part('[role=alert]').hidden = !refused;
    part('input').value = '';
    dialog.showModal();
    part('input').focus();
    return new Promise((resolve) => { dialog.onclose = () => resolve(given); });
  };
}
