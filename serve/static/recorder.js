// Records the microphone as 16-bit WAV, which every browser can play and seek.

const HEADER = 44; // bytes

/** Why this browser cannot record, or "" if it can. */
export function whyNoRecording() {
  if (!window.isSecureContext) return "Recording needs https, or the page opened as localhost.";
  if (!navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode) return "This browser cannot record.";
  return "";
}

export class Recorder {
  /** onLevel gets the loudness (0 to 1) and the seconds so far; onSamples, if given, Int16Array and the rate. */
  constructor({ onLevel, onSamples = null }) {
    this.onLevel = onLevel;
    this.onSamples = onSamples;
    this.blocks = [];
    this.count = 0;
  }

  /** Start. Throws DOMException if there is no microphone, or the user does not allow it. */
  async start() {
    const constraints = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    this.stream = await navigator.mediaDevices.getUserMedia({ audio: constraints });
    this.context = new AudioContext();
    try {
      await this.context.audioWorklet.addModule(new URL("recorder-worklet.js", import.meta.url));
      await this.context.resume();
      this.node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
      this.done = new Promise((resolve) => {
        this.node.port.onmessage = ({ data }) => {
          this.take(data.samples);
          if (data.last) resolve();
        };
      });
      this.context.createMediaStreamSource(this.stream).connect(this.node);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  take(samples) {
    const block = new Int16Array(samples.length);
    let loudest = 0;
    samples.forEach((sample, index) => {
      const within = Math.max(-1, Math.min(1, sample));
      loudest = Math.max(loudest, Math.abs(within));
      block[index] = Math.round(within * 32767);
    });
    this.blocks.push(block);
    this.count += block.length;
    this.onSamples?.(block, this.context.sampleRate);
    this.onLevel(loudest, this.count / this.context.sampleRate);
  }

  /** Stop, and return the recording as a File. */
  async stop() {
    this.node.port.postMessage("rest");
    await this.done;
    const rate = this.context.sampleRate;
    this.close();
    const at = new Date().toTimeString().slice(0, 8).replaceAll(":", ".");
    return new File([wavHeader(this.count, rate), ...this.blocks], `recording ${at}.wav`, { type: "audio/wav" });
  }

  /** Stop, and discard the recording. */
  close() {
    this.stream.getTracks().forEach((track) => track.stop());
    this.context.close();
  }
}

function wavHeader(count, rate) {
  const view = new DataView(new ArrayBuffer(HEADER));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, HEADER - 8 + 2 * count, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // bytes of this chunk
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true); // bits
  text(36, "data");
  view.setUint32(40, 2 * count, true);
  return view.buffer;
}
