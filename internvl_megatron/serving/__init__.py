"""A trained model behind OpenAI's chat completions interface."""
