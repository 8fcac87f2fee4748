// Asks for the key when the server does, or when a person wants to change or forget it.

import { key } from "./client.js";
import { setText, show } from "./dom.js";

export class KeyDialog {
  #dialog = document.getElementById("key-dialog");
  #input = document.getElementById("key-value");

  constructor(onChange) {
    const change = (value) => {
      key.set(value);
      this.#dialog.close();
      onChange();
    };
    this.#dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#input.value.trim()) change(this.#input.value.trim());
    });
    document.getElementById("key-forget").addEventListener("click", () => change(""));
    document.getElementById("key-cancel").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => {
      this.#input.value = "";
    });
  }

  open(reason) {
    setText(document.getElementById("key-reason"), reason);
    show(document.getElementById("key-forget"), key.get() !== "");
    if (!this.#dialog.open) this.#dialog.showModal();
  }
}
