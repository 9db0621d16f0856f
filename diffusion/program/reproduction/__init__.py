"""The paper's figures and tables (Pokle, Geng & Kolter 2022) measured anew on models and images at hand."""
