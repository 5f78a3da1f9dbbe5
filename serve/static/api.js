// Client of the server's API: requests with the key, errors as ApiError, streams of events.

const BASE = new URL("../v1/", import.meta.url);
const KEY = "afnext.key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export const isAbort = (error) => error.name === "AbortError";

/** The response of a request. `json` or `body` makes it a POST. Throws ApiError unless it succeeds. */
export async function request(path, { method, json, body, signal } = {}) {
  const headers = authorization();
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const content = json !== undefined ? JSON.stringify(json) : body;
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      method: method ?? (content === undefined ? "GET" : "POST"), headers, body: content, signal,
    });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw unreachable();
  }
  if (!response.ok) throw errorOf(response.status, await response.text(), response.headers.get("Retry-After"));
  return response;
}

/** A WebSocket of the API. Browsers cannot set its headers, so the key is one of its protocols, as in OpenAI's API. */
export function socket(path) {
  const url = new URL(path, BASE);
  url.protocol = url.protocol.replace("http", "ws");
  const key = apiKey();
  return new WebSocket(url, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
}

/** The events of a streamed response, up to `[DONE]`. Throws ApiError for an error event or an early end. */
export async function* events(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("The connection ended before the answer did.");
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, event.error);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw unreachable();
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Upload a recording to /v1/files. `report` gets the fraction sent so far. */
export function upload(file, { report, signal }) {
  return new Promise((resolve, reject) => {
    const call = new XMLHttpRequest(); // fetch does not report the progress of an upload
    const abort = () => call.abort();
    call.open("POST", new URL("files", BASE));
    for (const [name, value] of Object.entries(authorization())) call.setRequestHeader(name, value);
    call.upload.onprogress = (event) => event.lengthComputable && report(event.loaded / event.total);
    call.onload = () => {
      if (call.status === 200) resolve(JSON.parse(call.responseText));
      else reject(errorOf(call.status, call.responseText, call.getResponseHeader("Retry-After")));
    };
    call.onerror = () => reject(unreachable());
    call.onabort = () => reject(new DOMException("the upload was stopped", "AbortError"));
    signal.addEventListener("abort", abort);
    call.onloadend = () => signal.removeEventListener("abort", abort);
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file, file.name);
    call.send(form);
  });
}

function authorization() {
  const key = apiKey();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function errorOf(status, text, retryAfter) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // a proxy in between may answer with anything
  }
  const again = status === 429 && retryAfter ? ` (in about ${retryAfter} s)` : "";
  return new ApiError((error.message ?? `The server answered with status ${status}.`) + again, { ...error, status });
}

function unreachable() {
  return new ApiError("The server cannot be reached. Is it still running?", { code: "unreachable" });
}
