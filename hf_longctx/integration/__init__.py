"""The only code that knows Transformers' extension points, one module a slot."""
