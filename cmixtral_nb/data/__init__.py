"What ships beside the modules: text, styles, and programs that run in processes of their own."
