// Sends the microphone's samples to recorder.js, mixed to one channel, in blocks.

const BLOCK = 2048;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(BLOCK);
    this.filled = 0;
    this.port.onmessage = () => this.send(true); // recorder.js requests the rest
  }

  process([channels]) {
    const length = channels.length ? channels[0].length : 0;
    for (let i = 0; i < length; i++) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.block[this.filled++] = sum / channels.length;
      if (this.filled === BLOCK) this.send(false);
    }
    return true;
  }

  send(last) {
    this.port.postMessage({ samples: this.block.slice(0, this.filled), last });
    this.filled = 0;
  }
}

registerProcessor("capture", Capture);
