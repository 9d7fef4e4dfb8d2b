// Fails if the diagram on standard input is not valid Mermaid.

import { text } from "node:stream/consumers";
import mermaid from "mermaid";

await mermaid.parse(await text(process.stdin));
