// The server, as this page asks it. The key lives in this tab's session storage and in nothing else.

const STORED = "halftone-key";
const TIMEOUT_MS = 8000;

/** Where the server's routes begin: beside `/dashboard`, whatever stands before it. */
const BASE = new URL(".", document.baseURI);

/** An answer that is no success, or none at all (`status` 0). `message` is the server's own word where it gave one. */
export class ServerError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

export const getText = async (path) => whole(await request(path), "text");

export const getJson = async (path) => whole(await request(path), "json");

/** `signal` takes the place of the time limit. */
export const sendJson = async (method, path, body, signal) => whole(await request(path, { ...json(method, body), signal }), "json");

/** The JSON of each server-sent event, as they come. Ends with the answer; raises ServerError for an error event. */
export async function* stream(path, body, signal) {
  const response = await request(path, { ...json("POST", body), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(response.status, event.error.message);
    yield event;
  }
  throw new ServerError(response.status, "The answer broke off before its end.");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
  }
}

function json(method, body) {
  return { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const signal = options.signal ?? AbortSignal.timeout(TIMEOUT_MS);
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers, signal, cache: "no-store" });
  } catch (error) {
    throw unanswered(error);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The body, which may be late, or break off, after the headers came. */
async function whole(response, form) {
  try {
    return await response[form]();
  } catch (error) {
    throw unanswered(error);
  }
}

function unanswered(error) {
  if (error.name === "AbortError") return error;
  const slow = error.name === "TimeoutError";
  return new ServerError(0, slow ? `No answer within ${TIMEOUT_MS / 1000} s.` : "The server cannot be reached.");
}

async function refusal(response) {
  const fallback = `The server answered ${response.status} ${response.statusText}.`;
  try {
    const { error } = await response.json();
    return new ServerError(response.status, error.message ?? fallback, error.param ?? null);
  } catch {
    return new ServerError(response.status, fallback);
  }
}
