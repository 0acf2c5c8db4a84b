// The blind test: X is one of A and B by chance, and the page tells only after the answer. It plays
// the sounds of the players above (nothing is stored twice) through one of its own, which is not
// seen: a visible player that moves would tell what is playing.
(() => {
  "use strict";
  const room = document.getElementById("blind-room");
  const pairs = JSON.parse(document.getElementById("blind-pairs").textContent);
  const say = (text) => { document.getElementById("blind-says").textContent = text; };
  let trial = null, right = 0, count = 0;

  // of at least `hits` right answers in `n` by chance alone
  const chance = (hits, n) => {
    let term = Math.pow(0.5, n), sum = 0;
    for (let k = 0; k <= n; k += 1) {
      if (k >= hits) sum += term;
      term *= (n - k) / (k + 1);
    }
    return Math.min(1, sum);
  };
  const coin = () => crypto.getRandomValues(new Uint8Array(1))[0] < 128;
  const hidden = new Audio();
  const stop = () => {
    hidden.pause();
    document.querySelectorAll("audio").forEach((a) => { a.pause(); });
  };
  const play = (id) => {
    stop();
    hidden.src = document.getElementById(id).src;
    hidden.play();
  };
  const next = () => {
    const pair = pairs[crypto.getRandomValues(new Uint32Array(1))[0] % pairs.length];
    const swapped = coin();
    trial = { a: pair.takes[swapped ? 1 : 0], b: pair.takes[swapped ? 0 : 1], isA: coin(), pair };
  };
  const answer = (saysA) => {
    stop();
    const isRight = saysA === trial.isA;
    count += 1;
    right += isRight ? 1 : 0;
    const p = chance(right, count);
    say(`${isRight ? "Right" : "Wrong"}: X was ${trial.isA ? "A" : "B"}, ` +
      `${(trial.isA ? trial.a : trial.b).name}, of “${trial.pair.prompt}”. ` +
      `${right} of ${count} right; guessing alone does as well with probability ${p.toFixed(3)}.`);
    next();
  };
  const buttons = {
    "Play A": () => play(trial.a.id), "Play B": () => play(trial.b.id),
    "Play X": () => play((trial.isA ? trial.a : trial.b).id),
    "X is A": () => answer(true), "X is B": () => answer(false),
  };
  for (const [name, act] of Object.entries(buttons)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", act);
    room.append(button);
  }
  next();
  say("Listen to A, B and X as often as you like, then say which one X is.");
})();
