// Lint of the page's modules, in development only; .ci/run installs what it imports.

import js from "@eslint/js";
import globals from "globals";

export default [
  js.configs.recommended,
  {
    languageOptions: { ecmaVersion: 2023, sourceType: "module", globals: globals.browser },
    rules: {
      "max-len": ["error", { code: 110 }],
      "max-lines": ["error", { max: 250 }],
      "max-lines-per-function": ["error", { max: 40 }],
      "one-var": ["error", "never"],
      "prefer-const": "error",
      eqeqeq: "error",
    },
  },
];
