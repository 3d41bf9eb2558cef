// The npm client of the tests: commands come as JSON lines on stdin, events go
// out as JSON lines on stdout. One process serves every test but those that stop it.
"use strict";
const readline = require("node:readline");
const WebSocket = require("ws");

const sockets = new Map();

function emit(id, event) {
  process.stdout.write(JSON.stringify({ id, ...event }) + "\n");
}

function dial({ id, url, headers }) {
  const ws = new WebSocket(url, { headers, perMessageDeflate: true });
  sockets.set(id, ws);
  ws.on("open", () => emit(id, { event: "open", extensions: ws.extensions }));
  ws.on("message", (data, binary) => emit(id, { event: "message", data: data.toString("base64"), binary }));
  ws.on("error", (err) => emit(id, { event: "error", reason: String(err) }));
  ws.on("close", (code, reason) => {
    sockets.delete(id);
    emit(id, { event: "close", code, reason: reason.toString() });
  });
}

function send({ id, parts }) {
  const ws = sockets.get(id);
  parts.forEach((part, i) => ws?.send(Buffer.from(part, "base64"), { binary: false, fin: i === parts.length - 1 }));
}

readline.createInterface({ input: process.stdin }).on("line", (line) => {
  const command = JSON.parse(line);
  switch (command.op) {
    case "dial":
      return dial(command);
    case "send":
      return send(command);
    case "close":
      return sockets.get(command.id)?.close(command.code, command.reason);
    case "drop":
      return sockets.get(command.id)?.terminate();
  }
  throw new Error("unknown command " + line);
});
