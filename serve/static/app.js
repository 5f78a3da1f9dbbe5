// The page: connects its elements and modules.

import { ApiError, apiKey, isAbort, request, setApiKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { canHear, LiveRecording } from "./live.js";
import { Player } from "./player.js";
import { Presets } from "./presets.js";
import { Recorder, whyNoRecording } from "./recorder.js";
import { Recording } from "./recording.js";
import { clock, duration } from "./times.js";
import { TranscriptView } from "./transcript.js";

const THINK = "Please think and reason about the input audio before you respond."; // from the model card
const LOADING_POLL = 1500; // milliseconds

const $ = (id) => document.getElementById(id);
let recording = null;
let recorder = null;

const player = new Player({
  audio: $("audio"), wave: $("wave"), button: $("play"), clock: $("clock"),
  onTime: (seconds, playing) => transcript.at(seconds, playing),
  onUnplayable: () => note("This browser cannot play the file; the model can still listen to it."),
});
const seek = (seconds) => player.seek(seconds);
const conversation = new Conversation({ log: $("log"), seek, onBusy: busy });
const transcript = new TranscriptView({
  list: $("segments"), state: $("transcript-state"), start: $("transcribe"), stop: $("transcribe-stop"),
  downloads: $("downloads"), follow: $("follow"), seek, onError: needsKey,
});
const presets = new Presets({ group: $("presets"), languages: $("languages"), onPrompt: ask });

// The model

async function connect() {
  try {
    const { data } = await (await request("models")).json();
    const { id, afnext } = data[0];
    if (!("dtype" in afnext)) {
      $("model").textContent = `${id} is loading…`;
      setTimeout(connect, LOADING_POLL);
      return;
    }
    $("model").textContent = [id, afnext.quant ?? afnext.dtype, afnext.device].join(" · ");
    $("model").classList.add("ready");
    $("demo").hidden = id !== "afnext-tiny";
    $("limit").textContent = `, up to ${duration(afnext.max_audio_seconds)}`;
    $("speak-choice").hidden = !afnext.voice;
    presets.show(afnext.tasks ?? []);
  } catch (error) {
    $("model").textContent = "not connected";
    $("model").classList.remove("ready");
    show(error);
  }
}

// Messages

function show(error, retry = null) {
  if (isAbort(error)) return;
  $("problem").querySelector("p").textContent = error.message;
  $("problem").hidden = false;
  $("problem-retry").hidden = !retry;
  $("problem-retry").onclick = () => {
    $("problem").hidden = true;
    retry();
  };
  if (!(error instanceof ApiError)) console.error(error);
  needsKey(error);
}

function needsKey(error) {
  if (error.code !== "invalid_api_key") return;
  $("key").open = true;
  $("key-value").focus();
}

function note(text) {
  $("audio-notes").append(`${$("audio-notes").textContent && " · "}${text}`);
  $("audio-notes").hidden = false;
}

// A recording

/** context: a promise of the context of a recording that was processed live; its conversation continues. */
async function open(file, context = null) {
  recording?.leave();
  $("problem").hidden = true;
  $("audio-notes").replaceChildren();
  $("audio-notes").hidden = true;
  const opened = new Recording(file, {
    context,
    onStage: (stage, part) => opened === recording && stageOf(stage, part),
    onPeaks: (peaks, seconds) => opened === recording && player.setPeaks(peaks, seconds),
  });
  recording = opened;
  $("start").hidden = true;
  $("work").hidden = false;
  $("name").textContent = file.name;
  player.load(file);
  if (context) conversation.goOn(opened);
  else conversation.about(opened);
  transcript.about(opened);
  $("question").focus({ preventScroll: true });
  try {
    await opened.begin();
    heard(opened);
  } catch (error) {
    failed(opened, error);
  }
}

function heard(opened) {
  if (opened !== recording) return;
  for (const { truncated, warnings } of opened.audio) {
    if (truncated) note("only its beginning was heard");
    for (const warning of warnings) note(warning);
  }
}

function failed(opened, error) {
  if (opened !== recording) return;
  stageOf("", 0);
  const beginning = () => opened.listen({ truncate: true }).then(() => heard(opened), (again) => failed(opened, again));
  show(error, error.code === "audio_too_long" && opened.id ? beginning : null);
}

function stageOf(stage, part) {
  $("listening").hidden = !stage;
  $("progress").value = part;
  const percent = `${Math.floor(100 * part)} %`;
  $("progress-text").textContent = stage === "Uploading" && part === 1 ? "Uploaded" : `${stage} ${percent}`;
}

function startAgain() {
  recording?.leave();
  recording = null;
  player.audio.pause();
  conversation.stop();
  transcript.about(null);
  $("work").hidden = true;
  $("problem").hidden = true;
  $("start").hidden = false;
  $("choose").focus();
}

// Questions

function ask(text) {
  if (!text || !recording || conversation.running) return;
  const question = $("think").checked && !text.includes(THINK) ? `${text} ${THINK}` : text;
  conversation.ask(question, { followUp: $("follow-up").checked, spoken: $("speak").checked });
}

function busy(answering) {
  $("ask").hidden = answering;
  $("stop").hidden = !answering;
  presets.busy(answering);
}

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (conversation.running) return;
  ask($("question").value.trim());
  $("question").value = "";
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask-form").requestSubmit();
});
$("stop").addEventListener("click", () => {
  conversation.stop();
  $("question").focus();
});

// Recording

async function record() {
  const live = new LiveRecording({ onLost: show });
  const onLevel = (loudness, seconds) => {
    $("level").value = loudness;
    $("record-time").textContent = clock(seconds, 0);
  };
  recorder = new Recorder({ onLevel, onSamples: (samples) => live.push(samples) });
  try {
    await recorder.start();
  } catch (error) {
    recorder = null;
    const refused = error.name === "NotAllowedError";
    show(new ApiError(refused ? "The browser was not allowed to use the microphone." : `No microphone: ${error.message}`));
    return;
  }
  $("start").hidden = true;
  $("recording").hidden = false;
  $("record-stop").focus();
  if (canHear(recorder.context.sampleRate)) askMeanwhile(live, recorder.context.sampleRate);
}

/** Let the user ask about the audio recorded so far. */
async function askMeanwhile(live, rate) {
  recording = live;
  try {
    await live.open(rate);
  } catch (error) {
    live.leave();
    if (recording === live) recording = null;
    show(error);
    return;
  }
  if (recording !== live || !recorder) return;
  conversation.about(live);
  $("work").classList.add("live");
  $("work").hidden = false;
}

async function stopRecording() {
  const [stopped, live] = [recorder, recording];
  recorder = null;
  const file = await stopped.stop();
  endRecording();
  const context = live?.connected ? live.finish().catch(() => null) : null; // else the file is processed
  if (context) recording = null; // it ends without a call
  open(file, context);
}

function endRecording() {
  $("recording").hidden = true;
  $("work").classList.remove("live");
}

$("record").addEventListener("click", record);
$("record-stop").addEventListener("click", stopRecording);
$("record-cancel").addEventListener("click", () => {
  recorder.close();
  recorder = null;
  endRecording();
  startAgain();
});
$("record").disabled = Boolean(whyNoRecording());
$("record-hint").textContent = whyNoRecording();
$("record-hint").hidden = !whyNoRecording();

// Choosing and dropping files

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) open($("file").files[0]);
  $("file").value = "";
});
$("another").addEventListener("click", startAgain);

for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", type === "dragover" && !recorder);
    const file = type === "drop" && !recorder && event.dataTransfer.files[0];
    if (file) open(file);
  });
}

// The key

$("key-value").value = apiKey();
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey($("key-value").value.trim());
  $("key").open = false;
  $("problem").hidden = true;
  connect();
  if (recording?.file && !recording.id) open(recording.file);
});
$("problem-close").addEventListener("click", () => ($("problem").hidden = true));

connect();
