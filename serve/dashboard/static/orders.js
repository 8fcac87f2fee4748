// What a person asks the server to do: sent once, and what came of it is said beside the button.

import { sendJson, ServerError } from "./client.js";
import { setText } from "./dom.js";

export class Orders {
  #look;
  #askKey;
  #said;

  /** `said`: the element that tells what came of an order. `look()` and `askKey(reason)` are the page's. */
  constructor({ look, askKey }, said) {
    this.#look = look;
    this.#askKey = askKey;
    this.#said = said;
  }

  /** The answer, said as `told(answer)`; null where the server refused, which is said too, as `Not done: why`. */
  async send(method, path, body, told, refused = "Not done") {
    try {
      const answer = await sendJson(method, path, body);
      setText(this.#said, told(answer));
      this.#look();
      return answer;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      setText(this.#said, `${refused}: ${error.message}`);
      if (error.status === 401) this.#askKey(error.message);
      return null;
    }
  }
}
