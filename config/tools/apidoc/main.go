// Command apidoc writes the reference of an API package from its Go types: the
// kinds with their fields, validation and columns, and the constants that are
// part of the API. It uses the standard library only and needs no dependency of
// the package to be there.
package main

import (
	"flag"
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
)

func main() {
	out := flag.String("out", "", "file to write; the arguments are the directories of the API packages")
	flag.Parse()
	if err := run(flag.Args(), *out); err != nil {
		fmt.Fprintln(os.Stderr, "apidoc:", err)
		os.Exit(1)
	}
}

func run(dirs []string, out string) error {
	var text strings.Builder
	text.WriteString(head)
	for _, dir := range dirs {
		p, err := load(dir)
		if err != nil {
			return err
		}
		p.write()
		text.WriteString(p.b.String())
	}
	return os.WriteFile(out, []byte(text.String()), 0o644)
}

const head = `# API reference

<!-- Made from the Go types by "make generate"; do not edit. -->

Numbers such as P1 are those of the requirements in [design.md](design.md). Words are KEP-5823's.
`

// pkg is a parsed API package and the text that is made of it.
type pkg struct {
	fset    *token.FileSet
	files   []*ast.File
	info    *types.Info
	structs map[string]*declared // by type name
	kinds   []string             // of root objects, without lists
	written map[string]bool
	b       strings.Builder
}

type declared struct {
	spec *ast.TypeSpec
	doc  *ast.CommentGroup
}

func load(dir string) (*pkg, error) {
	p := &pkg{fset: token.NewFileSet(), structs: make(map[string]*declared), written: make(map[string]bool),
		info: &types.Info{Defs: make(map[*ast.Ident]types.Object)}}
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") || strings.HasPrefix(filepath.Base(path), "zz_generated") {
			continue
		}
		f, err := parser.ParseFile(p.fset, path, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		p.files = append(p.files, f)
	}
	if len(p.files) == 0 {
		return nil, fmt.Errorf("no Go files in %s", dir)
	}
	// Only the constants' values are wanted, so imports need not be found.
	config := types.Config{Importer: nothing{}, IgnoreFuncBodies: true, Error: func(error) {}}
	config.Check(dir, p.fset, p.files, p.info)
	for _, f := range p.files {
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE {
				continue
			}
			for _, s := range g.Specs {
				t := s.(*ast.TypeSpec)
				p.structs[t.Name.Name] = &declared{t, g.Doc}
				if markers(g.Doc).has("kubebuilder:object:root") && !strings.HasSuffix(t.Name.Name, "List") {
					p.kinds = append(p.kinds, t.Name.Name)
				}
			}
		}
	}
	return p, nil
}

type nothing struct{}

func (nothing) Import(path string) (*types.Package, error) {
	return nil, fmt.Errorf("%s is not needed", path)
}

func (p *pkg) write() {
	var doc *ast.CommentGroup
	for _, f := range p.files {
		if f.Doc != nil {
			doc = f.Doc
		}
	}
	group := markers(doc).value("groupName")
	p.printf("\n# %s/%s\n\n%s\n", group, p.files[0].Name.Name, prose(doc))
	for _, kind := range p.kinds {
		p.kind(kind)
	}
	for _, f := range p.files {
		for _, d := range f.Decls {
			if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.CONST {
				p.constants(g)
			}
		}
	}
}

func (p *pkg) kind(name string) {
	d := p.structs[name]
	m := markers(d.doc)
	p.printf("\n## %s\n\n%s\n\n", name, prose(d.doc))
	if short := m.argument("kubebuilder:resource", "shortName"); short != "" {
		p.printf("Short name: `%s`.\n", short)
	}
	if paths := m.arguments("kubebuilder:selectablefield", "JSONPath"); len(paths) > 0 {
		for i := range paths {
			paths[i] = "`" + strings.TrimPrefix(paths[i], ".") + "`"
		}
		p.printf("Field selectors: %s.\n", strings.Join(paths, ", "))
	}
	if columns := m.arguments("kubebuilder:printcolumn", "name"); len(columns) > 0 {
		p.printf("Columns of `kubectl get`: %s.\n", strings.Join(columns, ", "))
	}
	p.object(name, "")
}

// object writes a table of a struct's fields and then of the structs in it.
func (p *pkg) object(name, path string) {
	p.written[name] = true
	s := p.structs[name].spec.Type.(*ast.StructType)
	title := name
	if path != "" {
		title = fmt.Sprintf("%s: %s", path, name)
		p.printf("\n### %s\n\n%s\n", title, prose(p.structs[name].doc))
	}
	p.printf("\n| field | type | description |\n| --- | --- | --- |\n")
	type child struct{ name, path string }
	var children []child
	var rules []string
	rules = append(rules, markers(p.structs[name].doc).arguments("kubebuilder:validation:XValidation", "message")...)
	for _, f := range s.Fields.List {
		field, inline := jsonName(f)
		if inline || field == "" {
			continue
		}
		m := markers(f.Doc)
		kind, inner := p.typeOf(f.Type)
		text := prose(f.Doc)
		if field == "metadata" {
			text = "Standard object metadata."
		}
		var notes []string
		if !m.has("optional") && !strings.HasPrefix(field, "status") {
			notes = append(notes, "Required.")
		}
		notes = append(notes, bounds(m)...)
		if d := p.structs[inner]; d != nil {
			notes = append(notes, bounds(markers(d.doc))...)
		}
		rules = append(rules, m.arguments("kubebuilder:validation:XValidation", "message")...)
		p.printf("| `%s` | %s | %s |\n", field, kind, strings.TrimSpace(strings.Join(append([]string{oneLine(text)}, notes...), " ")))
		if d := p.structs[inner]; d != nil {
			if _, isStruct := d.spec.Type.(*ast.StructType); isStruct && !p.written[inner] {
				children = append(children, child{inner, strings.TrimPrefix(path+"."+field, ".")})
			}
		}
	}
	if len(rules) > 0 {
		p.printf("\nRules:\n\n")
		for _, r := range rules {
			p.printf("- %s\n", r)
		}
	}
	for _, c := range children {
		if !p.written[c.name] {
			p.object(c.name, c.path)
		}
	}
}

// constants writes a group of constants that share a comment.
func (p *pkg) constants(g *ast.GenDecl) {
	var rows []string
	for _, s := range g.Specs {
		v := s.(*ast.ValueSpec)
		for _, name := range v.Names {
			c, ok := p.info.Defs[name].(*types.Const)
			if !ok || !name.IsExported() || name.Name == "GroupName" || c.Val().Kind() != constant.String {
				continue
			}
			doc := prose(v.Doc)
			if doc == "" {
				doc = strings.TrimSpace(v.Comment.Text())
			}
			if doc == "" && len(g.Specs) == 1 {
				doc = prose(g.Doc)
			}
			doc = strings.TrimPrefix(doc, name.Name+" ")
			rows = append(rows, fmt.Sprintf("| `%s` | `%s` | %s |\n", constant.StringVal(c.Val()), name.Name, oneLine(doc)))
		}
	}
	if len(rows) == 0 {
		return
	}
	if len(g.Specs) > 1 {
		title, rest, _ := strings.Cut(prose(g.Doc), ".")
		if title == "" {
			title = "Names"
		}
		p.printf("\n## %s\n", oneLine(title))
		if rest = strings.TrimSpace(rest); rest != "" {
			p.printf("\n%s\n", rest)
		}
	} else {
		p.printf("\n## `%s`\n", constant.StringVal(p.info.Defs[g.Specs[0].(*ast.ValueSpec).Names[0]].(*types.Const).Val()))
	}
	p.printf("\n| value | in Go | meaning |\n| --- | --- | --- |\n%s", strings.Join(rows, ""))
}

// typeOf names a type for readers, and the type of the package in it, if any.
func (p *pkg) typeOf(e ast.Expr) (shown, inner string) {
	switch t := e.(type) {
	case *ast.StarExpr:
		return p.typeOf(t.X)
	case *ast.ArrayType:
		shown, inner = p.typeOf(t.Elt)
		return "list of " + shown, inner
	case *ast.MapType:
		key, _ := p.typeOf(t.Key)
		value, inner := p.typeOf(t.Value)
		return "map of " + key + " to " + value, inner
	case *ast.SelectorExpr:
		switch t.Sel.Name {
		case "Time":
			return "time", ""
		case "Duration":
			return "duration", ""
		case "UID":
			return "string", ""
		}
		return t.Sel.Name, ""
	case *ast.Ident:
		d := p.structs[t.Name]
		if d == nil {
			return strings.TrimSuffix(strings.TrimSuffix(t.Name, "32"), "64"), ""
		}
		if under, ok := d.spec.Type.(*ast.Ident); ok {
			return under.Name, t.Name
		}
		return t.Name, t.Name
	}
	return "", ""
}

func (p *pkg) printf(format string, args ...any) { fmt.Fprintf(&p.b, format, args...) }

func jsonName(f *ast.Field) (name string, inline bool) {
	if f.Tag == nil {
		return "", false
	}
	tag := reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("json")
	name, options, _ := strings.Cut(tag, ",")
	return name, strings.Contains(options, "inline")
}

// marks are the marker comments of a declaration, such as "optional" or
// "kubebuilder:validation:Minimum=0".
type marks []string

func markers(doc *ast.CommentGroup) marks {
	var m marks
	if doc == nil {
		return m
	}
	for _, c := range doc.List {
		if text := strings.TrimSpace(strings.TrimPrefix(c.Text, "//")); strings.HasPrefix(text, "+") {
			m = append(m, text[1:])
		}
	}
	return m
}

func (m marks) has(name string) bool {
	for _, s := range m {
		if before, _, _ := strings.Cut(s, "="); before == name {
			return true
		}
	}
	return false
}

func (m marks) value(name string) string {
	for _, s := range m {
		if before, after, ok := strings.Cut(s, "="); ok && before == name {
			return after
		}
	}
	return ""
}

// arguments are what markers of a name say for one of their arguments.
func (m marks) arguments(name, argument string) []string {
	find := regexp.MustCompile(`[:,]` + argument + "=(?:\"([^\"]*)\"|`([^`]*)`|([^,]*))")
	var all []string
	for _, s := range m {
		if !strings.HasPrefix(s, name+":") {
			continue
		}
		if found := find.FindStringSubmatch(s[len(name):]); found != nil {
			all = append(all, found[1]+found[2]+found[3])
		}
	}
	return all
}

func (m marks) argument(name, argument string) string {
	if all := m.arguments(name, argument); len(all) > 0 {
		return all[0]
	}
	return ""
}

// bounds says in words what simple validation markers state.
func bounds(m marks) []string {
	var notes []string
	for _, b := range []struct{ marker, words string }{
		{"Enum", "One of: %s."},
		{"Minimum", "At least %s."},
		{"Maximum", "At most %s."},
		{"MinLength", "At least %s characters."},
		{"MaxLength", "At most %s characters."},
		{"MaxItems", "At most %s entries."},
		{"MaxProperties", "At most %s entries."},
		{"items:MaxLength", "Each at most %s characters."},
	} {
		if v := m.value("kubebuilder:validation:" + b.marker); v != "" && !(b.marker == "MinLength" && v == "1") {
			notes = append(notes, fmt.Sprintf(b.words, strings.ReplaceAll(v, ";", ", ")))
		}
	}
	return notes
}

// prose is a comment without its markers.
func prose(doc *ast.CommentGroup) string {
	if doc == nil {
		return ""
	}
	var lines []string
	for _, line := range strings.Split(doc.Text(), "\n") {
		if !strings.HasPrefix(strings.TrimSpace(line), "+") {
			lines = append(lines, line)
		}
	}
	return strings.TrimSpace(strings.Join(lines, "\n"))
}

func oneLine(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
}
