// Formats segments of a transcript as files, like the server.

const TIGHT = /[\u3000-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff9f]/; // Chinese, Japanese: no spaces

export const FORMATS = {
  txt: { type: "text/plain", write: toText },
  srt: { type: "application/x-subrip", write: toSrt },
  vtt: { type: "text/vtt", write: toVtt },
  json: { type: "application/json", write: toJson },
};

function toText(segments) {
  let text = "";
  segments.forEach((segment, index) => {
    const before = segments[index - 1];
    if (before && before.speaker === segment.speaker) text += separator(before.text, segment.text) + segment.text;
    else text += `${before ? "\n" : ""}${labelled(segment)}`;
  });
  return text ? `${text}\n` : "";
}

function toSrt(segments) {
  return segments.map((segment, index) => `${index + 1}\n${times(segment, ",")}\n${labelled(segment)}\n`).join("\n");
}

function toVtt(segments) {
  const voice = ({ speaker }) => (speaker ? `<v ${escaped(speaker)}>` : "");
  return `WEBVTT\n${segments.map((s) => `\n${times(s, ".")}\n${voice(s)}${escaped(s.text)}\n`).join("")}`;
}

function toJson(segments, about) {
  const values = segments.map(({ start, end, text, speaker }) => ({ start, end, text, ...(speaker && { speaker }) }));
  return `${JSON.stringify({ ...about, segments: values }, null, 2)}\n`;
}

const labelled = ({ speaker, text }) => (speaker ? `[${speaker}] ${text}` : text);

const separator = (before, after) => (TIGHT.test(before.slice(-1)) && TIGHT.test(after.slice(0, 1)) ? "" : " ");

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function times({ start, end }, point) {
  const from = Math.round(start * 1000);
  return `${stamp(from, point)} --> ${stamp(Math.max(from + 1, Math.round(end * 1000)), point)}`; // no empty segments
}

function stamp(milliseconds, point) {
  const two = (value) => String(value).padStart(2, "0");
  const seconds = Math.floor(milliseconds / 1000);
  const rest = String(milliseconds % 1000).padStart(3, "0");
  return `${two(Math.floor(seconds / 3600))}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}${point}${rest}`;
}
