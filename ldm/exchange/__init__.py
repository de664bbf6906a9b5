"""Import and export: other people's layouts of files and configurations, seen as ours and back."""
