"use strict";
// Swagger UI over the service's own description; the key that the tab was given goes with every request.

(() => {
  let key = null;
  try {
    key = sessionStorage.getItem("gpu-service-key");
  } catch {
    // The browser keeps nothing for this page; a service without a key works all the same.
  }

  SwaggerUIBundle({
    url: new URL("openapi.json", document.baseURI).href,
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
    requestInterceptor: (request) => {
      if (key && new URL(request.url, document.baseURI).origin === location.origin) request.headers["X-API-Key"] = key;
      return request;
    },
  });
})();
