// The examples name resources that do not exist. Put the newest real ones in their place, so that "Execute" works.
const EXAMPLES = {
  "mdl_01k0b6x2v9m4c8d7e5f3g1h0j2": "v1/models?limit=1",
  "dst_01k0b6x2v9m4c8d7e5f3g1h0j2": "v1/datasets?limit=1",
  "job_01k0b6x2v9m4c8d7e5f3g1h0j2": "v1/jobs?limit=1",
};
const ARTIFACT = "art_01k0b6x2v9m4c8d7e5f3g1h0j2";
const LEFT_BY_A_JOB = /\/(report|result|download)$/;
const UPLOAD = "upl_01k0b6x2v9m4c8d7e5f3g1h0j2";

async function newest(url) {
  const answer = await fetch(url);
  return answer.ok ? (await answer.json()).items[0] : undefined;
}

async function specWithRealIds() {
  let text = await (await fetch("openapi.json")).text();
  for (const [example, url] of Object.entries(EXAMPLES)) {
    const found = await newest(url);
    if (found) text = text.replaceAll(example, found.id);
  }
  const done = await newest("v1/jobs?limit=1&status=succeeded");
  if (done) text = text.replaceAll(ARTIFACT, done.artifacts[0].id);
  const spec = JSON.parse(text);
  if (done) {
    // The newest job may run still, or have failed: these ask for what one that succeeded left.
    for (const [path, operations] of Object.entries(spec.paths)) {
      if (!LEFT_BY_A_JOB.test(path)) continue;
      operations.get.parameters.find((parameter) => parameter.name === "job_id").example = done.id;
    }
  }
  return spec;
}

// Uploads are not listed: examples that name one mean the last that was started on this page.
let lastUpload = UPLOAD;

function rememberUpload(response) {
  const made = /\/v1\/uploads\/(upl_[0-9a-z]+)$/.exec(response.headers?.location ?? "");
  if (made) lastUpload = made[1];
  return response;
}

function nameLastUpload(request) {
  request.url = request.url.replaceAll(UPLOAD, lastUpload);
  if (typeof request.body === "string") request.body = request.body.replaceAll(UPLOAD, lastUpload);
  return request;
}

specWithRealIds().then((spec) => SwaggerUIBundle({
  spec,
  requestInterceptor: nameLastUpload,
  responseInterceptor: rememberUpload,
  dom_id: "#docs",
  deepLinking: true,
  displayOperationId: false,
  displayRequestDuration: true,
  filter: true,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: 0,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
}));
