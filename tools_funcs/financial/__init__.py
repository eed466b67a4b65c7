"""The modules of `tools_funcs.financial_tools_complex`: one tool per file."""
