// The few things that every part does with the document.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

export function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
}

/** The one element of a <template>, copied. */
export function copy(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

export const asImage = (png) => `data:image/png;base64,${png}`;
