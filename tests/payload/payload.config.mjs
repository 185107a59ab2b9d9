// The CMS of a film platform, as small as it gets: who writes (users), what a film is made of (projects, scenes), and where results go: media
// with required fields, and clips that are kept by their address alone.
import path from "node:path";
import { sqliteAdapter } from "@payloadcms/db-sqlite";
import { buildConfig } from "payload";

const folder = path.resolve(process.env.PAYLOAD_FOLDER);
const GIB = 1024 ** 3;

const loggedIn = ({ req }) => Boolean(req.user);
const text = (name) => ({ name, type: "text" });
const number = (name) => ({ name, type: "number" });

export default buildConfig({
  secret: "of-this-test-alone",
  telemetry: false,
  graphQL: { disable: true },
  typescript: { autoGenerate: false },
  db: sqliteAdapter({ client: { url: `file:${path.join(folder, "payload.db")}` }, push: true }),
  // without this a file may have 20 MiB, and a request 50
  upload: process.env.PAYLOAD_OWN_LIMITS ? {} : { limits: { fileSize: GIB }, requestSizeLimit: 2 * GIB },
  collections: [
    { slug: "users", auth: { useAPIKey: true }, fields: [] },
    { slug: "projects", fields: [{ ...text("title"), required: true }] },
    {
      slug: "media",
      access: { read: loggedIn },
      upload: { staticDir: path.join(folder, "media"), mimeTypes: ["image/*", "video/*", "audio/*"] },
      fields: [
        { ...text("alt"), required: true },
        { name: "project", type: "relationship", relationTo: "projects", required: true },
        { name: "mediaType", type: "select", required: true, options: ["video_segment", "character_design", "audio_clip"] },
        { name: "agentGenerated", type: "checkbox" },
        {
          name: "generationMetadata",
          type: "group",
          fields: [text("taskId"), { name: "promptUsed", type: "textarea" }, text("modelVersion"), number("generationTime"), number("seed")],
        },
        { name: "technicalData", type: "group", fields: [number("duration"), text("resolution"), number("fps"), number("sampleRate")] },
      ],
    },
    { slug: "clips", fields: [text("title"), text("film"), { ...text("address"), required: true }, text("task"), text("kind")] },
    {
      slug: "scenes",
      fields: [
        text("title"),
        { name: "project", type: "relationship", relationTo: "projects" },
        { name: "clip", type: "upload", relationTo: "media" },
        { name: "takes", type: "group", fields: [text("note"), { name: "first", type: "upload", relationTo: "media" }] },
      ],
    },
  ],
});
