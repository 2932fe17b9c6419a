/** The tab of generated pictures: prompts, what was kept of their candidates, best first, and how all were ranked. */

import { figure, grid, make, many, words } from './view.js';

const FEW = 12; // scores shown without being asked for

/** GET /v1/generated -> [prompt, items of view.js] for each prompt; ``href(id)`` is the link of an item. */
export function candidates({ prompts = [] }, href) {
  return prompts.map((found) => [found, (found.candidates ?? []).map(({ image = '', ...candidate }) => {
    const { prompt, prompt_key: key } = found;
    const { clip_score: similarity, rank, number } = candidate;
    const path = image.startsWith('v1/generated/') ? image : `v1/generated/${key}/${number}`;
    const record = { prompt, prompt_key: key, ...candidate };
    return { id: path, href: href(path), path, prompt, caption: prompt, similarity, rank, record };
  })]);
}

/** A section for each prompt. ``open(id)`` as for view.js's grid, ``search(prompt)`` looks for real pairs like it. */
export function sections(found, open, search) {
  return found.map(([{ prompt, run, rankings = [] }, items]) => {
    const like = make('button', { type: 'button', class: 'quiet', click: () => search(prompt) }, 'Search for it');
    const ranked = items.map((item) => ({ ...item, caption: `#${item.rank}` }));
    return make(
      'section', { class: 'prompt' },
      make('h2', { title: `run ${run}` }, words(prompt, 600), ' ', like),
      grid(ranked, open, { label: `Candidates of ${prompt.slice(0, 100)}` }),
      rankings.length > items.length ? scores(rankings) : null, // else each stands below its picture
    );
  });
}

/** All candidates of a prompt by rank, those that were not kept among them. */
function scores(rankings) {
  const one = ({ rank, number, clip_score: score }) => make(
    'li', { title: `rank ${rank}: candidate ${number}` }, make('span', { class: 'soft' }, `#${rank} `), figure(score),
  );
  const list = (some) => make('ol', { class: 'scores' }, ...some.map(one));
  if (rankings.length <= FEW) return list(rankings);
  return make('details', {}, make('summary', {}, `Scores of all ${many(rankings.length)} candidates`), list(rankings));
}
