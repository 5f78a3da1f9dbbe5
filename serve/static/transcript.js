// The transcript: segments as they come, the one that is being played, and files of it.

import { events, isAbort } from "./api.js";
import { FORMATS } from "./subtitles.js";
import { clock, timeButton } from "./times.js";

const COLOURS = 6;

export class TranscriptView {
  constructor({ list, state, start, stop, downloads, follow, seek, onError }) {
    Object.assign(this, { list, state, startButton: start, stopButton: stop, downloads, follow, seek, onError });
    this.intro = state.textContent;
    this.running = null;
    start.addEventListener("click", () => this.run());
    stop.addEventListener("click", () => this.running?.abort());
    for (const button of downloads.querySelectorAll("button")) {
      button.addEventListener("click", () => this.download(button.dataset.format));
    }
    this.about(null);
  }

  /** Show nothing yet of another recording. */
  about(recording) {
    this.running?.abort();
    this.recording = recording;
    this.clear(this.intro);
  }

  clear(text) {
    this.segments = [];
    this.speakers = [];
    this.current = -1;
    this.list.replaceChildren();
    this.list.hidden = true;
    this.downloads.hidden = true;
    this.state.textContent = text;
    this.state.classList.remove("wrong");
  }

  async run() {
    const running = (this.running = new AbortController());
    const { recording } = this;
    this.clear("Transcribing…");
    this.busy(true);
    try {
      const form = new FormData();
      const fields = { file_id: await recording.stored, response_format: "verbose_json", stream: "true" };
      for (const [name, value] of Object.entries(fields)) form.append(name, value);
      let warnings = [];
      for await (const event of events("audio/transcriptions", { body: form, signal: running.signal })) {
        if (event.type === "transcript.text.segment") this.add(event);
        if (event.type === "transcript.text.done") warnings = event.warnings ?? [];
      }
      this.state.textContent = [this.segments.length ? "" : "Nobody speaks, as far as the model hears.", ...warnings]
        .filter(Boolean).join(" · ");
    } catch (error) {
      if (this.recording !== recording) return;
      const stopped = isAbort(error);
      this.state.textContent = stopped ? "Stopped. This is the part that was written." : error.message;
      this.state.classList.toggle("wrong", !stopped);
      if (!stopped) this.onError(error);
    } finally {
      if (this.running === running) {
        this.running = null;
        this.busy(false);
      }
    }
    this.downloads.hidden = !this.segments.length;
  }

  busy(busy) {
    this.startButton.hidden = busy;
    this.stopButton.hidden = !busy;
    this.list.setAttribute("aria-busy", String(busy));
  }

  add({ start, end, text, speaker = null }) {
    const before = this.segments.at(-1);
    this.segments.push({ start, end, text, speaker });
    const item = document.createElement("li");
    item.append(timeButton(start, clock(start), this.seek));
    if (speaker && speaker !== before?.speaker) item.append(this.label(speaker));
    const words = document.createElement("span");
    words.textContent = text;
    item.append(words);
    this.list.append(item);
    this.list.hidden = false;
    this.state.textContent = `Transcribing… ${clock(end, 0)} of ${clock(this.recording.seconds, 0)}`;
  }

  label(speaker) {
    if (!this.speakers.includes(speaker)) this.speakers.push(speaker);
    const label = document.createElement("strong");
    label.className = `speaker speaker-${this.speakers.indexOf(speaker) % COLOURS}`;
    label.textContent = speaker;
    return label;
  }

  /** Mark what is said at a time, and keep it in view while it plays. */
  at(seconds, playing) {
    const started = this.segments.findLastIndex(({ start }) => start <= seconds + 0.01);
    const current = started >= 0 && seconds < this.segments[started].end ? started : -1;
    if (current === this.current) return;
    this.list.children[this.current]?.removeAttribute("aria-current");
    this.current = current;
    const item = this.list.children[current];
    if (!item) return;
    item.setAttribute("aria-current", "true");
    if (!playing || !this.follow.checked) return;
    const middle = item.offsetTop - (this.list.clientHeight - item.offsetHeight) / 2; // the page itself stays put
    this.list.scrollTo({ top: middle, behavior: matchMedia("(prefers-reduced-motion)").matches ? "auto" : "smooth" });
  }

  download(format) {
    const { type, write } = FORMATS[format];
    const { file, seconds } = this.recording;
    const text = write(this.segments, { filename: file.name, duration: seconds });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = `${file.name.replace(/\.[^.]*$/, "")}.${format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
