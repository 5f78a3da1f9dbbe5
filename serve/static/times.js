// Times of a recording: formats them, and finds them in a model's text.

const CLOCK = String.raw`(?:\d{1,3}:)?\d{1,3}:\d{1,2}(?:[.,]\d{1,3})?|\d{1,6}(?:\.\d{1,3})?\s?s`;
const RANGE = String.raw`\[\s*(${CLOCK})(?:\s*(?:-->|[-–—]|to)\s*(?:${CLOCK}))?\s*\]`;
const BARE = String.raw`(?<![\d:.,])(\d{1,3}(?::\d{2}){1,2}[.,]\d{1,3})(?![\d:])`; // [00:12.3 - 00:14.0], or 00:12.3
const MARKER = new RegExp(`${RANGE}|${BARE}`, "g");
const UNFINISHED = /(?:\[[^\]\n]{0,40}|[\d:.,]{1,14})$/; // what may become a time

/** Seconds as mm:ss.s, or h:mm:ss.s from an hour on. */
export function clock(seconds, digits = 1) {
  const unit = 10 ** digits;
  const whole = Math.round(Math.max(0, seconds) * unit);
  const rest = String(Math.floor(whole / unit) % 60).padStart(2, "0");
  const part = digits ? `.${String(whole % unit).padStart(digits, "0")}` : "";
  const minutes = Math.floor(whole / unit / 60);
  if (minutes < 60) return `${String(minutes).padStart(2, "0")}:${rest}${part}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}${part}`;
}

/** A length in words, for people. */
export function duration(seconds) {
  if (seconds < 60) return `${Number(seconds.toFixed(1))} s`;
  return seconds % 60 ? clock(seconds, 0) : `${seconds / 60} min`;
}

/** A button that moves the playback to a time. */
export function timeButton(seconds, text, seek) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "time";
  button.textContent = text;
  button.title = "Play from here";
  button.addEventListener("click", () => seek(seconds));
  return button;
}

/** Text that arrives in pieces, as text nodes and, for times within the recording, buttons. */
export class TimedText {
  constructor(element, { length, seek }) {
    this.text = "";
    this.element = element;
    this.length = length;
    this.seek = seek;
    this.held = "";
  }

  push(piece) {
    this.text += piece;
    const text = this.held + piece;
    const end = UNFINISHED.exec(text)?.index ?? text.length;
    this.held = text.slice(end);
    this.write(text.slice(0, end));
  }

  finish() {
    this.write(this.held);
    this.held = "";
    this.element.normalize();
  }

  write(text) {
    let end = 0;
    for (const match of text.matchAll(MARKER)) {
      const seconds = parse(match[1] ?? match[2]);
      if (seconds > this.length() + 1) continue;
      const shown = match[0].replace(/^\[\s*|\s*\]$/g, "");
      this.element.append(text.slice(end, match.index), timeButton(seconds, shown, this.seek));
      end = match.index + match[0].length;
    }
    this.element.append(text.slice(end));
  }
}

function parse(text) {
  if (text.endsWith("s")) return parseFloat(text);
  return text.replace(",", ".").split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
}
