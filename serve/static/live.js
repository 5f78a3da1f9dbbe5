// A recording in progress: its samples go to the realtime endpoint, which answers questions meanwhile.

import { ApiError, socket } from "./api.js";

const MOST_RATE = 48000; // Hz; the server's limit

/** Whether the server accepts live samples of this rate. */
export const canHear = (rate) => rate <= MOST_RATE;

export class LiveRecording {
  /** onLost gets the error once, if the connection ends early. */
  constructor({ onLost }) {
    this.onLost = onLost;
    this.seconds = 0;
    this.listeners = new Set();
    this.waiting = []; // samples from before the connection
  }

  /** Connect. rate: samples per second. Throws ApiError. */
  async open(rate) {
    this.rate = rate;
    this.socket = socket("realtime");
    this.socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    this.socket.onclose = () => this.lost();
    this.model = (await this.next("session.created")).session.model;
    this.send({ type: "session.update", session: { audio: { input: { format: { type: "audio/pcm", rate } } } } });
    await this.next("session.updated");
    this.connected = true;
    this.waiting.splice(0).forEach((samples) => this.append(samples));
  }

  /** Send the next samples, Int16Array. */
  push(samples) {
    this.seconds += samples.length / (this.rate ?? Infinity);
    if (this.connected) this.append(samples);
    else if (!this.closed) this.waiting.push(samples);
  }

  append(samples) {
    this.send({ type: "input_audio_buffer.append", audio: base64(samples) });
  }

  /** The pieces of an answer about all samples so far, as chunks of a chat completion. Throws ApiError. */
  async *answer(messages, { signal, spoken, onState }) {
    onState("thinking about it…");
    const input = messages.map(({ role, content }) => {
      const type = role === "user" ? "input_text" : "output_text";
      return { type: "message", role, content: [{ type, text: content }] };
    });
    const modalities = [spoken ? "audio" : "text"];
    const stop = () => this.send({ type: "response.cancel" });
    const coming = this.listen();
    try {
      this.send({ type: "response.create", response: { conversation: "none", input, output_modalities: modalities } });
      signal.addEventListener("abort", stop);
      for await (const event of coming) {
        if (event.type === "error" && event.error.code !== "speech_failed") throw new ApiError(event.error.message, event.error);
        if (event.type in DELTAS) yield { model: this.model, choices: [{ delta: DELTAS[event.type](event.delta) }] };
        if (event.type !== "response.done") continue;
        signal.throwIfAborted();
        yield ended(event.response);
        return;
      }
    } finally {
      signal.removeEventListener("abort", stop);
      coming.return();
    }
  }

  /** End the recording. Returns its context, or null. Throws ApiError. */
  async finish() {
    this.send({ type: "afnext.finish" });
    const { context } = await this.next("afnext.context");
    this.leave();
    return context;
  }

  /** Disconnect; the recording is not needed any more. */
  leave() {
    this.closed = true;
    this.socket?.close();
  }

  send(event) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(event));
  }

  take(event) {
    for (const listener of this.listeners) listener(event);
  }

  lost() {
    const error = new ApiError("The connection for questions while recording has ended; the recording goes on.");
    this.take({ type: "error", error });
    if (!this.closed) this.onLost(error);
    this.connected = false;
    this.closed = true;
  }

  /** The next event of a type. Throws ApiError for an error event. */
  async next(type) {
    for await (const event of this.listen()) {
      if (event.type === type) return event;
      if (event.type === "error") throw new ApiError(event.error.message, event.error);
    }
    return null;
  }

  /** The events from now on. */
  listen() {
    const queue = [];
    let wake = () => {};
    const listener = (event) => {
      queue.push(event);
      wake();
    };
    this.listeners.add(listener);
    const { listeners } = this;
    return (async function* () {
      try {
        for (;;) {
          while (queue.length) yield queue.shift();
          await new Promise((resolve) => (wake = resolve));
        }
      } finally {
        listeners.delete(listener);
      }
    })();
  }
}

const DELTAS = {
  "response.output_text.delta": (content) => ({ content }),
  "response.output_audio_transcript.delta": (content) => ({ content }),
  "response.reasoning_text.delta": (text) => ({ reasoning_content: text }),
  "response.output_audio.delta": (data) => ({ audio: { data } }),
};

/** The last chunk of a response. Throws ApiError if it failed. */
function ended({ status, status_details: why, usage, afnext }) {
  if (status === "failed") throw new ApiError(why.error.message, why.error);
  if (status === "cancelled") throw new ApiError("The answer was stopped.");
  return { choices: [], afnext, usage: { completion_tokens: usage.output_tokens, audio_seconds: usage.audio_seconds } };
}

function base64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}
