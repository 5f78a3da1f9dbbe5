// The model's tasks, as buttons.

const LABELS = {
  asr: "Transcribe",
  "asr-timestamps": "Transcribe with times",
  ast: "Translate…",
  caption: "Describe",
  "long-caption": "Describe in detail",
  music: "Music",
  lyrics: "Lyrics",
  diarize: "Who says what",
  "diarize-timestamps": "Who says what, when",
};
const LANGUAGES =
  "Arabic Chinese Czech Danish Dutch English Finnish French German Greek Hebrew Hindi Hungarian Indonesian Italian " +
  "Japanese Korean Norwegian Persian Polish Portuguese Romanian Russian Spanish Swedish Thai Turkish Ukrainian " +
  "Urdu Vietnamese";
const FROM = " from {source}";

export class Presets {
  /** group: where the buttons go. languages: the fields of a translation. onPrompt gets the prompt to send. */
  constructor({ group, languages, onPrompt }) {
    this.group = group;
    this.languages = languages;
    this.onPrompt = onPrompt;
    this.source = languages.querySelector("#source");
    this.target = languages.querySelector("#target");
    const names = languages.querySelector("datalist");
    for (const name of LANGUAGES.split(" ")) names.append(new Option(name, name));
    languages.querySelector("button").addEventListener("click", () => this.translate());
    for (const field of [this.source, this.target]) {
      field.addEventListener("keydown", (event) => {
        if (event.key !== "Enter") return;
        event.preventDefault();
        this.translate();
      });
    }
  }

  show(tasks) {
    const own = tasks.filter(({ prompt }) => prompt); // a task without a prompt is the user's own question
    this.group.replaceChildren(...own.map((task) => this.button(task)));
    this.group.hidden = !own.length;
  }

  busy(busy) {
    for (const button of this.group.children) button.disabled = busy;
    this.languages.querySelector("button").disabled = busy;
  }

  button({ name, description, prompt }) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = LABELS[name] ?? name;
    button.title = description || prompt;
    if (!prompt.includes("{target}")) {
      button.addEventListener("click", () => this.onPrompt(prompt));
      return button;
    }
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      this.template = prompt;
      this.languages.hidden = !this.languages.hidden;
      button.setAttribute("aria-expanded", String(!this.languages.hidden));
      if (!this.languages.hidden) this.target.focus();
    });
    return button;
  }

  translate() {
    const [source, target] = [this.source.value.trim(), this.target.value.trim() || this.target.placeholder];
    this.onPrompt(this.template.replace(FROM, source ? ` from ${source}` : "").replace("{target}", target));
  }
}
