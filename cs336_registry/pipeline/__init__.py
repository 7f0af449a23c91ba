"""From text to a trained model: corpus → tokenizer → tokens → training → evaluation → generation → report.

Every step is a file, reads what the step before wrote, and can be run again after an interruption. All of them take
their components from the registry, so any backend serves any step. Importing this imports no framework.
"""
