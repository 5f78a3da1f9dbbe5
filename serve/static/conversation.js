// Questions about a recording and their answers.

import { isAbort } from "./api.js";
import { duration, TimedText } from "./times.js";
import { Voice } from "./voice.js";

const ENDS = {
  length: "cut off: it reached the longest answer",
  deadline: "cut off: it ran out of time",
  repetition: "ended because it repeated itself",
};

export class Conversation {
  /** log: the element of the answers. seek: moves the playback. onBusy: called when an answer starts and ends. */
  constructor({ log, seek, onBusy }) {
    this.log = log;
    this.seek = seek;
    this.onBusy = onBusy;
    this.turns = [];
    this.recording = null;
    this.running = null;
    this.voice = new Voice();
  }

  /** Forget the answers, and ask another recording from now on. */
  about(recording) {
    this.stop();
    this.recording = recording;
    this.turns = [];
    this.log.replaceChildren();
  }

  /** Use another Recording of the same audio from now on. */
  goOn(recording) {
    this.recording = recording;
  }

  stop() {
    this.running?.abort();
    this.voice.stop();
  }

  /** Ask, and show the answer as it arrives. followUp: include earlier questions and answers. spoken: play it. */
  async ask(question, { followUp = false, spoken = false } = {}) {
    const running = (this.running = new AbortController());
    const { recording } = this;
    const view = new AnswerView(question, { length: () => recording.seconds || Infinity, seek: this.seek });
    this.log.append(view.element);
    view.element.scrollIntoView({ block: "nearest" });
    this.onBusy(true);
    try {
      await this.stream(recording, view, { before: followUp ? this.turns : [], spoken, signal: running.signal });
      const answer = { role: "assistant", content: view.answer.text };
      this.turns = [...this.turns, { role: "user", content: question }, answer];
      view.finish();
      await this.voice.played();
    } catch (error) {
      this.voice.stop();
      view.fail(isAbort(error) ? "stopped" : error.message, !isAbort(error));
    } finally {
      if (this.running === running) {
        this.running = null;
        this.onBusy(false);
      }
    }
  }

  async stream(recording, view, { before, spoken, signal }) {
    const messages = [...before, { role: "user", content: view.question }];
    const onState = (text) => view.wait(text);
    for await (const chunk of recording.answer(messages, { signal, spoken, onState })) {
      view.follow(() => view.take(chunk));
      const sound = chunk.choices[0]?.delta?.audio?.data;
      if (sound && !signal.aborted) this.voice.push(sound);
    }
  }
}

class AnswerView {
  constructor(question, timing) {
    this.question = question;
    this.facts = [];
    this.began = performance.now();
    this.element = make("article", "turn");
    this.element.setAttribute("aria-busy", "true"); // so that screen readers read it once, whole
    const asked = make("p", "question", question);
    this.thinking = make("details", "thinking");
    this.thinking.hidden = true;
    this.thought = new TimedText(make("div", "thought"), timing);
    this.summary = make("summary", "", "Thinking…");
    this.thinking.append(this.summary, this.thought.element);
    this.answer = new TimedText(make("div", "answer"), timing);
    this.meta = make("p", "hint meta");
    this.element.append(asked, this.thinking, this.answer.element, this.meta);
  }

  wait(text) {
    this.meta.textContent = text;
  }

  /** Append text, and keep the end in view if it was in view before. */
  follow(grow) {
    const seen = this.meta.getBoundingClientRect().top < innerHeight;
    grow();
    if (seen) this.meta.scrollIntoView({ block: "nearest" });
  }

  take({ model, choices, usage, afnext }) {
    this.model = model ?? this.model;
    const delta = choices[0]?.delta ?? {};
    const text = delta.content || delta.audio?.transcript;
    if ((delta.reasoning_content || text) && !this.first) {
      this.first = performance.now() - this.began;
      this.wait("");
    }
    if (delta.reasoning_content) {
      this.thinking.hidden = false;
      this.thought.push(delta.reasoning_content);
    }
    if (text) {
      this.summary.textContent = "Thinking";
      this.answer.push(text);
    }
    if (afnext) {
      const cached = afnext.reloaded ? ["heard again first"] : [];
      this.facts.push(...cached, ...(ENDS[afnext.finish_reason] ? [ENDS[afnext.finish_reason]] : []), ...afnext.warnings);
    }
    if (usage) this.facts.unshift(`${usage.completion_tokens} tokens`, `${duration(usage.audio_seconds)} of audio`);
  }

  finish() {
    this.end();
    if (!this.answer.text) this.answer.element.append(make("em", "", "The model said nothing."));
    const first = this.first ? [`first word after ${(this.first / 1000).toFixed(2)} s`] : [];
    this.meta.textContent = [this.model, ...first, ...this.facts].join(" · ");
    if (navigator.clipboard) this.meta.append(this.copyButton());
  }

  fail(message, wrong) {
    this.end();
    this.meta.textContent = message;
    this.meta.classList.toggle("wrong", wrong);
  }

  end() {
    this.summary.textContent = "Thinking";
    this.thought.finish();
    this.answer.finish();
    this.element.setAttribute("aria-busy", "false");
  }

  copyButton() {
    const button = make("button", "link", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(this.answer.text);
      button.textContent = "Copied";
    });
    return button;
  }
}

function make(name, className = "", text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}
