/** Requests: the token, errors as the server words them, and pictures that may need the token, too. */

const TOKEN = 'clipmill-token';
const PATIENCE = 60_000; // ms; the server gives up long before

/** What went wrong: what the server says of it, with ``status`` (0: no answer) and ``after``, seconds until a retry. */
export class Problem extends Error {
  constructor(told, status = 0, after = null) {
    super(told.problem);
    const { code = '', problem, expected = '', actual = '', remedy = '' } = told;
    Object.assign(this, { code, problem, expected, actual, remedy, status, after });
  }

  /** May the same request succeed in a moment? */
  get passing() {
    return this.status === 429 || this.status === 503;
  }

  /** Is it the filter that was refused? */
  get ofFilter() {
    return this.code === 'where';
  }
}

/** An error as a Problem. */
export function asProblem(error) {
  if (error instanceof Problem) return error;
  return new Problem({ problem: 'The page made a mistake', actual: String(error), remedy: 'load it again' });
}

let askForToken = async () => null;
let asking = null;

/** ``ask(refused)`` gets a token from the user, or null; ``refused``: there was one, and the server did not take it. */
export function tokensFrom(ask) {
  askForToken = ask;
}

/** The JSON that the server answers to GET, or to POST where there is a ``body``. Throws a Problem. */
export async function ask(path, { body, signal } = {}) {
  const options = body && {
    method: 'POST', body: JSON.stringify(body), headers: { 'Content-Type': 'application/json' },
  };
  return (await send(path, options, signal)).json();
}

/** The bytes at ``path``. */
export async function bytes(path, signal) {
  return (await send(path, {}, signal)).blob();
}

async function send(path, options = {}, signal = undefined) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  const patience = AbortSignal.timeout(PATIENCE);
  const until = signal ? AbortSignal.any([signal, patience]) : patience;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, signal: until });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem({
      code: 'unreachable', problem: 'The server does not answer',
      actual: patience.aborted ? 'no answer in a minute' : '',
      remedy: 'Is clipmill serve still running, and can this machine reach it?',
    });
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && (await newToken(token))) return send(path, options, signal);
  throw await problemOf(answer);
}

/** Is there another token than the ``used`` one? Requests that fail together ask once. */
async function newToken(used) {
  if (sessionStorage.getItem(TOKEN) === used) {
    asking ??= askForToken(used !== null).finally(() => { asking = null; });
    const given = await asking;
    if (given) sessionStorage.setItem(TOKEN, given);
    return Boolean(given);
  }
  return true;
}

async function problemOf(answer) {
  const told = (await answer.json().catch(() => null))?.error;
  const unknown = { problem: `The server answered HTTP ${answer.status}`, actual: answer.statusText };
  const after = Number.parseFloat(answer.headers.get('Retry-After'));
  return new Problem(told?.problem ? told : unknown, answer.status, Number.isFinite(after) ? after : null);
}

// ---- pictures ----

const paths = new WeakMap();
const nearby = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) fill(target);
}, { rootMargin: '600px' });

/** Shows the picture at ``path`` in ``img`` once that comes near the screen. One that isn't there is marked missing. */
export function showPicture(img, path) {
  img.classList.remove('missing');
  img.onerror = () => img.classList.add('missing');
  if (sessionStorage.getItem(TOKEN)) { // <img> sends no header, and a token does not belong in a URL
    paths.set(img, path);
    nearby.observe(img);
  } else {
    img.src = path;
  }
}

async function fill(img) {
  nearby.unobserve(img);
  const path = paths.get(img);
  try {
    const url = URL.createObjectURL(await bytes(path));
    if (paths.get(img) !== path) return URL.revokeObjectURL(url); // meanwhile it shows another one
    img.onload = () => URL.revokeObjectURL(url);
    img.src = url;
  } catch {
    img.classList.add('missing');
  }
}
