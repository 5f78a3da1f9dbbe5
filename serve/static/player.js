// The recording: its waveform, playback and position.

import { clock } from "./times.js";

const BAR = 3; // pixels of a bar of the waveform, its gap included
const STEPS = { ArrowLeft: -5, ArrowRight: 5, PageDown: -30, PageUp: 30 }; // seconds

export class Player {
  /** audio, wave, button, clock: elements. onTime gets the position in seconds. */
  constructor({ audio, wave, button, clock, onTime, onUnplayable }) {
    this.audio = audio;
    this.wave = wave;
    this.canvas = wave.querySelector("canvas");
    this.button = button;
    this.clock = clock;
    this.onTime = onTime;
    this.seconds = 0;
    this.peaks = [];
    button.addEventListener("click", () => this.toggle());
    audio.addEventListener("loadedmetadata", () => (button.disabled = false));
    audio.addEventListener("error", () => audio.src && onUnplayable());
    for (const event of ["play", "pause", "ended"]) audio.addEventListener(event, () => this.show());
    for (const event of ["seeked", "timeupdate"]) audio.addEventListener(event, () => this.move());
    wave.addEventListener("pointerdown", (event) => this.drag(event));
    wave.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(wave);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  load(file) {
    URL.revokeObjectURL(this.audio.src);
    this.button.disabled = true;
    this.setPeaks([], 0);
    this.audio.src = URL.createObjectURL(file);
    this.move();
  }

  /** peaks: the smallest and largest sample of equal parts of the recording. */
  setPeaks(peaks, seconds) {
    this.peaks = peaks;
    this.seconds = seconds;
    this.wave.setAttribute("aria-valuemax", seconds.toFixed(1));
    this.move();
  }

  seek(seconds, play = true) {
    this.audio.currentTime = Math.max(0, this.seconds ? Math.min(seconds, this.seconds) : seconds);
    if (play && !this.button.disabled) this.audio.play().catch(() => {});
    this.move();
  }

  toggle() {
    if (this.audio.paused) this.audio.play().catch(() => {});
    else this.audio.pause();
  }

  show() {
    const playing = !this.audio.paused;
    this.button.classList.toggle("playing", playing);
    this.button.setAttribute("aria-label", playing ? "Pause" : "Play");
    if (playing) this.animate();
  }

  animate() {
    this.move();
    if (!this.audio.paused) requestAnimationFrame(() => this.animate());
  }

  move() {
    const at = this.audio.currentTime;
    const text = clock(at);
    const shown = this.seconds ? `${text} / ${clock(this.seconds)}` : text;
    if (this.clock.textContent !== shown) {
      this.clock.textContent = shown;
      this.wave.setAttribute("aria-valuenow", at.toFixed(1));
      this.wave.setAttribute("aria-valuetext", `${text} of ${clock(this.seconds)}`);
    }
    this.draw();
    this.onTime(at, !this.audio.paused);
  }

  drag(event) {
    if (!this.seconds) return;
    const to = ({ clientX }) => {
      const box = this.canvas.getBoundingClientRect();
      this.seek(((clientX - box.left) / box.width) * this.seconds, false);
    };
    to(event);
    this.wave.setPointerCapture(event.pointerId);
    this.wave.onpointermove = to;
    this.wave.onpointerup = this.wave.onpointercancel = () => (this.wave.onpointermove = null);
  }

  key(event) {
    const targets = { Home: 0, End: this.seconds };
    if (event.key === " ") this.toggle();
    else if (event.key in STEPS) this.seek(this.audio.currentTime + STEPS[event.key], false);
    else if (event.key in targets) this.seek(targets[event.key], false);
    else return;
    event.preventDefault();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.wave;
    const scale = devicePixelRatio || 1;
    if (!width) return;
    if (this.canvas.width !== Math.round(width * scale)) this.canvas.width = Math.round(width * scale);
    if (this.canvas.height !== Math.round(height * scale)) this.canvas.height = Math.round(height * scale);
    const style = getComputedStyle(this.wave);
    const [rest, played] = ["--wave", "--accent"].map((name) => style.getPropertyValue(name));
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const bars = Math.floor(width / BAR);
    const loudest = this.peaks.reduce((most, [low, high]) => Math.max(most, -low, high), 0) || 1;
    const at = this.seconds ? (this.audio.currentTime / this.seconds) * width : 0;
    for (let bar = 0; bar < bars; bar++) {
      const first = Math.floor((bar * this.peaks.length) / bars);
      const last = Math.max(first + 1, Math.floor(((bar + 1) * this.peaks.length) / bars));
      const loud = this.peaks.slice(first, last).reduce((most, [low, high]) => Math.max(most, -low, high), 0);
      const tall = Math.max(2, (loud / loudest) * (height - 2));
      pen.fillStyle = bar * BAR < at ? played : rest;
      pen.fillRect(bar * BAR, (height - tall) / 2, BAR - 1, tall);
    }
    if (this.seconds) {
      pen.fillStyle = played;
      pen.fillRect(Math.min(at, width - 2), 0, 2, height);
    }
  }
}
