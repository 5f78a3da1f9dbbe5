// Plays a spoken answer as it comes: 16-bit samples at 24 kHz, one block after the other.

const RATE = 24000;
const LEAD = 0.05; // seconds before the first block

export class Voice {
  constructor() {
    this.context = null;
    this.end = 0; // of what is scheduled, in the context's seconds
    this.sources = new Set();
    this.silent = () => {};
  }

  /** Play a block of samples in base64 after those before it. */
  push(data) {
    this.context ??= new AudioContext();
    this.context.resume();
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const samples = new Int16Array(bytes.buffer);
    if (!samples.length) return;
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    const channel = buffer.getChannelData(0);
    samples.forEach((sample, index) => (channel[index] = sample / 32768));
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    source.onended = () => this.ended(source);
    this.sources.add(source);
    const start = Math.max(this.end, this.context.currentTime + LEAD);
    source.start(start);
    this.end = start + buffer.duration;
  }

  /** Resolves when everything has been played, or stopped. */
  played() {
    if (!this.sources.size) return Promise.resolve();
    return new Promise((resolve) => (this.silent = resolve));
  }

  /** Stop playing and forget what is left. */
  stop() {
    for (const source of [...this.sources]) {
      source.stop();
      this.ended(source);
    }
    this.end = 0;
  }

  ended(source) {
    this.sources.delete(source);
    if (!this.sources.size) this.silent();
  }
}
