"""The rooms of `tools_funcs.financial_tools_complex`: one tool a file."""
