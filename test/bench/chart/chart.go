// Package chart draws bars as SVG: groups of them side by side, on a logarithmic scale.
package chart

import (
	"fmt"
	"html/template"
	"io"
	"math"
)

// Chart is what is drawn.
type Chart struct {
	Title string
	Unit  string   // of the values
	Names []string // of the bars in each group
	// Groups stand side by side. A value of 0 was not measured.
	Groups []Group
}

// Group has a value for each name.
type Group struct {
	Name   string
	Values []float64
}

// Sizes in pixels.
const (
	left, top, bottom = 70, 64, 34
	barWidth          = 26
	barGap            = 4
	groupGap          = 36
	plotHeight        = 260
	legendWidth       = 250
	legendLine        = 20
)

// colours tell bars apart, also for those who see few colours and in print.
var colours = []string{"#0b4f8a", "#e08214", "#5aae61", "#7b3294", "#b2182b", "#878787", "#35978f"}

type bar struct {
	X, Y, Width, Height float64
	Colour, Value       string
}

type text struct {
	X, Y float64
	Text string
}

type line struct {
	X, Y, Right float64
	Text        string
}

type swatch struct {
	X, Y   float64
	Colour string
	Text   string
}

type drawing struct {
	Width, Height     float64
	Title, Unit       string
	Bars              []bar
	Groups            []text
	Lines             []line
	Legend            []swatch
	Base, Left, Right float64
}

// Write draws the chart.
func (c Chart) Write(w io.Writer) error {
	lowest, highest := c.decades()
	perGroup := float64(len(c.Names)*(barWidth+barGap) - barGap)
	right := left + float64(len(c.Groups))*(perGroup+groupGap)
	base := float64(top + plotHeight)
	height := func(v float64) float64 {
		return plotHeight * (math.Log10(v) - lowest) / (highest - lowest)
	}
	d := drawing{
		Width: right + 16 + legendWidth, Height: base + bottom, Title: c.Title, Unit: c.Unit + ", logarithmic",
		Base: base, Left: left, Right: right,
	}
	for decade := lowest; decade <= highest; decade++ {
		v := math.Pow(10, decade)
		d.Lines = append(d.Lines, line{left, base - height(v), right, number(v)})
	}
	for g, group := range c.Groups {
		if len(group.Values) != len(c.Names) {
			return fmt.Errorf("group %s has %d values for %d names", group.Name, len(group.Values), len(c.Names))
		}
		x := left + groupGap/2 + float64(g)*(perGroup+groupGap)
		d.Groups = append(d.Groups, text{x + perGroup/2, base + 20, group.Name})
		for i, v := range group.Values {
			if v > 0 {
				h := max(1, height(v))
				d.Bars = append(d.Bars, bar{x + float64(i*(barWidth+barGap)), base - h, barWidth, h, colours[i%len(colours)], number(v)})
			}
		}
	}
	for i, name := range c.Names {
		d.Legend = append(d.Legend, swatch{right + 16, top + float64(i*legendLine), colours[i%len(colours)], name})
	}
	return page.Execute(w, d)
}

// decades are the powers of ten between which all values lie.
func (c Chart) decades() (lowest, highest float64) {
	least, most := math.Inf(1), 0.0
	for _, g := range c.Groups {
		for _, v := range g.Values {
			if v > 0 {
				least, most = min(least, v), max(most, v)
			}
		}
	}
	if most == 0 {
		return 0, 1
	}
	lowest = math.Floor(math.Log10(least))
	return lowest, max(math.Ceil(math.Log10(most)), lowest+1)
}

// number is a value as it stands above a bar.
func number(v float64) string {
	if v < 10 {
		return fmt.Sprintf("%.2g", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// Half is the middle of a bar.
func (b bar) Half() float64 { return b.X + b.Width/2 }

// Above is where a bar's value stands.
func (b bar) Above() float64 { return b.Y - 4 }

// White paper: who reads in the dark sees it all the same.
var page = template.Must(template.New("chart").Parse(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{.Width}} {{.Height}}" width="{{.Width}}" height="{{.Height}}" font-family="DejaVu Sans, Arial, sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="{{.Left}}" y="24" font-size="15" font-weight="bold">{{.Title}}</text>
<text x="{{.Left}}" y="44" fill="#555555">{{.Unit}}</text>
{{range .Lines}}<line x1="{{.X}}" y1="{{.Y}}" x2="{{.Right}}" y2="{{.Y}}" stroke="#dddddd"/><text x="{{.X}}" y="{{.Y}}" dx="-8" dy="4" text-anchor="end" fill="#555555">{{.Text}}</text>
{{end}}{{range .Bars}}<rect x="{{.X}}" y="{{.Y}}" width="{{.Width}}" height="{{.Height}}" fill="{{.Colour}}"/><text x="{{.Half}}" y="{{.Above}}" text-anchor="middle" font-size="10">{{.Value}}</text>
{{end}}<line x1="{{.Left}}" y1="{{.Base}}" x2="{{.Right}}" y2="{{.Base}}" stroke="#333333"/>
{{range .Groups}}<text x="{{.X}}" y="{{.Y}}" text-anchor="middle">{{.Text}}</text>
{{end}}{{range .Legend}}<rect x="{{.X}}" y="{{.Y}}" width="12" height="12" fill="{{.Colour}}"/><text x="{{.X}}" y="{{.Y}}" dx="18" dy="11">{{.Text}}</text>
{{end}}</svg>
`))
