/**
 * What the page shows, and its form in the URL: #q=red&key=1*123&text=-0.5*night&where=width>512&view=text&open=7
 *
 * It is in the fragment, so what people search for is in no server's log. Terms are written as on the command line,
 * WEIGHT*VALUE; q is the text that is still in the search field.
 */

export const DEFAULTS = {
  view: 'image', index: null, terms: [], text: '', where: '', prompt: '', k: 30, threshold: null, unique: null,
  diversity: null, open: null,
};
const VIEWS = ['image', 'text', 'generated'];
export const NUMBERS = ['k', 'threshold', 'unique', 'diversity'];
const WORDS = { q: 'text', index: 'index', where: 'where', prompt: 'prompt', open: 'open' };
const FIELDS = { text: 'text', key: 'key', url: 'image_url', image: 'image' }; // kind of term -> its name in a request
const KEY = /^\d{1,19}$/; // an int64, which a JavaScript number is not

/** Images given by hand, {file, url} by an id. A URL can name them, but another page does not know them. */
export const images = new Map();

/** The term of an image file. */
export function imageTerm(file) {
  const id = crypto.getRandomValues(new Uint32Array(2)).join('-');
  images.set(id, { file, url: URL.createObjectURL(file) });
  return { kind: 'image', value: id, weight: 1 };
}

/** The state that a URL's fragment names; what it does not know is left out. */
export function read(hash) {
  const state = { ...DEFAULTS, terms: [] };
  for (const [name, value] of new URLSearchParams(hash.replace(/^#/, ''))) {
    if (Object.hasOwn(FIELDS, name)) state.terms.push(...termOf(name, value));
    else if (Object.hasOwn(WORDS, name)) state[WORDS[name]] = value;
    else if (name === 'view' && VIEWS.includes(value)) state.view = value;
    else if (NUMBERS.includes(name) && value && Number.isFinite(Number(value))) state[name] = Number(value);
  }
  return state;
}

function termOf(kind, written) {
  const [, weight, value] = /^(-?\d+(?:\.\d+)?)\*([^]+)$/.exec(written) ?? [null, '1', written];
  return value && (kind !== 'key' || KEY.test(value)) ? [{ kind, value, weight: Number(weight) }] : [];
}

/** The fragment of a state, without "#". */
export function write(state) {
  const written = new URLSearchParams();
  for (const { kind, value, weight } of state.terms) written.append(kind, `${weight}*${value}`);
  for (const [name, field] of Object.entries(WORDS)) if (state[field]) written.append(name, state[field]);
  for (const name of ['view', ...NUMBERS]) {
    if (state[name] !== DEFAULTS[name] && state[name] !== null) written.append(name, state[name]);
  }
  return String(written);
}

/** Is ``open`` a pair's key? */
export const isKey = (open) => KEY.test(open ?? '');

/** The body of POST /v1/search. */
export async function question(state) {
  const terms = await Promise.all(state.terms.map(async ({ kind, value, weight }) => (
    { [FIELDS[kind]]: kind === 'image' ? await base64(images.get(value).file) : value, weight }
  )));
  if (state.text) terms.push({ text: state.text });
  const asked = { index: state.index, terms, modality: state.view, k: state.k };
  for (const name of ['where', 'threshold', 'unique', 'diversity']) {
    if (state[name] !== null && state[name] !== '') asked[name] = state[name];
  }
  return asked;
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(',')[1] ?? '');
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** A copy of an image file with sides of at most ``side`` pixels, as PNG or JPEG. */
export async function smaller(file, side = 1024) {
  const picture = await createImageBitmap(file);
  const scale = Math.min(1, side / Math.max(picture.width, picture.height));
  const canvas = new OffscreenCanvas(Math.ceil(picture.width * scale), Math.ceil(picture.height * scale));
  canvas.getContext('2d').drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: file.type === 'image/png' ? 'image/png' : 'image/jpeg', quality: 0.92 });
}
