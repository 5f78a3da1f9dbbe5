// A recording on the server: uploaded once, processed once, used by the id of its context.

import { events, request, upload } from "./api.js";

const PEAKS = 2000;

export class Recording {
  /** onStage gets the present stage ("Uploading", "Listening", "") and the fraction done. context: a promise of the
   * context of the same audio, if it was processed live; it may resolve to null. */
  constructor(file, { onStage, onPeaks, context = null }) {
    this.file = file;
    this.context = context;
    this.onStage = onStage;
    this.onPeaks = onPeaks;
    this.id = null; // of the stored file
    this.seconds = 0;
    this.audio = []; // the server's description
    this.leaving = new AbortController();
    this.stored = null; // a promise of the file's id
    this.ready = null; // a promise of the context's id
  }

  /** Upload and listen. Throws ApiError. */
  async begin() {
    this.onStage("Uploading", 0);
    const { signal } = this.leaving;
    const report = (part) => this.onStage("Uploading", part);
    this.stored = upload(this.file, { signal, report }).then(({ id }) => (this.id = id));
    this.ready = this.heardOrHear();
    this.ready.catch(() => {}); // those who await it get the error
    await this.stored;
    const context = await this.context;
    if (context) this.heard(context);
    await Promise.all([this.waveform(), this.ready]);
  }

  async heardOrHear() {
    const context = await this.context;
    if (context) return context.id;
    await this.stored;
    return this.hear(false);
  }

  /** Make the context, again if it has expired. truncate: use only the beginning if the recording is too long. */
  listen({ truncate = false } = {}) {
    this.ready = this.hear(truncate);
    this.ready.catch(() => {});
    return this.ready;
  }

  async hear(truncate) {
    this.onStage("Listening", 0);
    const json = { file_ids: [this.id], stream: true, truncate };
    for await (const event of events("contexts", { json, signal: this.leaving.signal })) {
      if (event.type === "context.progress") this.onStage("Listening", event.done / event.total);
      if (event.type !== "context.ready") continue;
      return this.heard(event.context);
    }
    throw new Error("the server did not say that it has listened");
  }

  heard(context) {
    this.audio = context.audio;
    this.onStage("", 1);
    return context.id;
  }

  /** The chunks of a chat completion about the recording. onState gets its state for display. Throws ApiError. */
  async *answer(messages, { signal, spoken, onState }) {
    onState("listening…");
    const speech = spoken ? { modalities: ["text", "audio"], audio: { format: "pcm16" } } : {};
    for (let again = false; ; again = true) {
      const context = await orStopped(this.ready, signal);
      const json = { messages, context, stream: true, stream_options: { include_usage: true }, ...speech };
      onState("thinking about it…");
      try {
        yield* events("chat/completions", { json, signal });
        return;
      } catch (error) {
        if (error.code !== "context_not_found" || again) throw error;
        onState("listening again…");
        this.listen();
      }
    }
  }

  async waveform() {
    const response = await request(`files/${this.id}/peaks?n=${PEAKS}`, { signal: this.leaving.signal });
    const { peaks, seconds } = await response.json();
    this.seconds = seconds;
    this.onPeaks(peaks, seconds);
  }

  /** Stop the work in progress and delete the uploaded file. The context expires by itself. */
  leave() {
    this.leaving.abort();
    if (this.id) request(`files/${this.id}`, { method: "DELETE" }).catch(() => {}); // it expires anyway
  }
}

/** The result of a promise, or an AbortError as soon as the signal is aborted. */
function orStopped(promise, signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    promise.then(resolve, reject);
  });
}
