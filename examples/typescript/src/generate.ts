// Streams a steered generation. Usage: node dist/generate.js PROMPT [VECTOR@LAYER:STRENGTH]
// The address of the server is PATCHCLAMP_ADDRESS, by default localhost:50051.
// The text goes to standard output, the receipt to standard error; the exit status is 1 when the server refuses.

import * as path from "node:path";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";
import type { GenerateRequest } from "./generated/patchclamp/v1/GenerateRequest";
import type { GenerateResponse__Output } from "./generated/patchclamp/v1/GenerateResponse";
import type { ProtoGrpcType } from "./generated/generation";

const PROTO = path.join(__dirname, "../../../proto");
// Seeds that the server chooses are below 2^53: a number holds them.
const definition = protoLoader.loadSync("patchclamp/v1/generation.proto", {
  includeDirs: [PROTO],
  longs: Number,
  enums: String,
  oneofs: true,
});
const { patchclamp } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;

/** What is asked for: a vector, as "joyful_sad@16:1.5", is added to every token's residual stream after that layer. */
function request(prompt: string, steer: string | undefined): GenerateRequest {
  const asked: GenerateRequest = { prompt: { text: prompt }, stop: { maxTokens: 40 } };
  if (steer === undefined) return asked;
  const match = /^([^@]+)@(\d+):(-?[\d.]+)$/.exec(steer);
  if (match === null) throw new Error(`expected VECTOR@LAYER:STRENGTH, got ${steer}`);
  const [, artifact, layer, strength] = match;
  const edit = {
    name: artifact,
    site: "SITE_RESID_POST" as const,
    layers: [Number(layer)],
    strength: Number(strength),
    add: { vector: { artifact } },
  };
  return { ...asked, program: { edits: [edit] } };
}

const [prompt, steer] = process.argv.slice(2);
if (prompt === undefined) {
  console.error("usage: node dist/generate.js PROMPT [VECTOR@LAYER:STRENGTH]");
  process.exit(2);
}
const address = process.env.PATCHCLAMP_ADDRESS ?? "localhost:50051";
const client = new patchclamp.v1.GenerationService(address, grpc.credentials.createInsecure());
// Without a deadline a call waits for ever.
const call = client.generate(request(prompt, steer), { deadline: Date.now() + 60_000 });

call.on("data", (response: GenerateResponse__Output) => {
  process.stdout.write(response.text ?? "");
  const receipt = response.finished?.receipt;
  for (const edit of receipt?.edits ?? []) {
    const change = (100 * (edit.meanRelativeChange ?? 0)).toFixed(1);
    console.error(`\n${edit.name}: ${edit.rows ?? 0} rows, mean change ${change} % of the norm`);
  }
});
call.on("end", () => client.close());
call.on("error", (error: grpc.ServiceError) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  client.close();
  process.exitCode = 1;
});
